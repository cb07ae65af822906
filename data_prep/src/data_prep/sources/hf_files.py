"""Where the rows of a Hugging Face data set are: the `datasets` library finds, downloads and converts its files.

Parquet and JSON lines are read as they are, so that one bad value costs one row and nothing is copied; everything else
becomes Arrow files in the library's cache. Formats that could run code (pickles) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, needs
from data_prep.shards.format import JsonObject
from data_prep.sources.parquet import parquet_pieces
from data_prep.sources.records import file_stat
from data_prep.sources.row_columns import Kinds, is_image_name
from data_prep.sources.tables import line_pieces

_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_BUILDERS = ("arrow", "imagefolder", "json", "parquet", "webdataset")
_OWN_IMPORTERS = {"csv": "texts` or `data-prep import images --table", "text": "moses", "xml": "tmx"}


@dataclass(frozen=True)
class HfFiles:
    """The files of one split.

    form: "parquet", "lines" or "arrow". features: the library's; None for JSON lines.
    roots: folders in which image files that rows name may lie: where the library keeps what it fetched and unpacked.
    """

    form: str
    files: tuple[Path, ...]
    features: Any = None
    roots: tuple[str, ...] = ()

    def pieces(self, rows: int) -> Iterator[JsonObject]:
        """Units of work, each with its `format`."""
        if self.form == "lines":
            for path in self.files:
                yield from ({**piece, "format": "lines"} for piece in line_pieces(path))
        elif self.form == "parquet":
            yield from ({**piece, "format": "parquet"} for piece in parquet_pieces(self.files, rows, columns=()))
        else:
            for path in self.files:
                stamp = file_stat(path)
                count = _library().Dataset.from_file(str(path)).num_rows
                for first in range(0, count, rows):
                    end = min(first + rows, count)
                    yield {"file": str(path), **stamp, "format": "arrow", "first": first, "end": end}


@dataclass(frozen=True)
class _Unknown:
    """A column of a type that the library has no feature for: Arrow's name of it."""

    dtype: str


def find_files(data: str, config: str, split: str, revision: str, *, lone: bool = False) -> HfFiles:
    """The files of a split of `data`: a folder of `save_to_disk`, a file or folder of files, or a name on the hub.

    Args:
        config, revision: empty for the default one.
        split: "train", for example. lone: take another one if it is the only one (a corpus has no split of its own).

    Raises:
        UserError: `datasets` is not installed; there is no such folder, name, configuration or split; the hub cannot be
            reached; the library cannot read the files; or the format is read by another importer, or by none.
    """
    path = Path(data)
    if path.is_file():
        return _from_file(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(data, split)
    if not path.is_dir() and (data.startswith(".") or not _NAME.fullmatch(data)):
        raise UserError(f"{data}: no such file or folder, and no name on the hub (OWNER/NAME)")
    return _built(data, config, revision, lambda splits: _split_among(splits, split, data, lone))


def config_names(data: str) -> list[str]:
    """The configurations of a data set on the hub. UserError as of `find_files`."""
    if not _NAME.fullmatch(data):
        raise UserError(f"{data}: no such folder, and no name on the hub (OWNER/NAME)")
    with _said(data):
        return list(map(str, _library().get_dataset_config_names(data)))


def _from_file(path: Path) -> HfFiles:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return HfFiles("parquet", (path,), _parquet_features(path))
    if name.endswith(_LINES):
        return HfFiles("lines", (path,))
    if name.endswith(".arrow"):
        with _said(str(path)):
            return HfFiles("arrow", (path,), _library().Dataset.from_file(str(path)).features)
    raise UserError(f"{path}: expected .parquet, .arrow or {', '.join(_LINES)}, or a folder")


def _saved(data: str, split: str) -> HfFiles:
    """A folder that `save_to_disk` wrote."""
    library = _library()
    with _said(data):
        saved = library.load_from_disk(data)
        if isinstance(saved, dict):
            saved = saved[_split_among(saved, split, data)]
        return _arrow(saved, data)


def _built(data: str, config: str, revision: str, choose: Callable[[Iterable[str]], str]) -> HfFiles:
    """A folder of files or a name on the hub, as the library resolves it."""
    library = _library()
    with _said(data):
        builder = library.load_dataset_builder(data, name=config or None, revision=revision or None)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _BUILDERS:
            own = _OWN_IMPORTERS.get(kind)
            raise UserError(f"{data}: holds {kind} files, " + (f"for `data-prep import {own}`" if own else "not read"))
        found = builder.config.data_files or {}
        files = list(map(str, found[choose(found)])) if found else []
        if kind == "parquet" or (files and all(name.lower().endswith(_LINES) for name in files)):
            local = tuple(Path(name) for name in library.DownloadManager().download(files))
            form = "parquet" if kind == "parquet" else "lines"
            return HfFiles(form, local, _parquet_features(local[0]) if form == "parquet" else None)
        builder.download_and_prepare()
        caches = library.config.HF_CACHE_HOME, library.config.DOWNLOADED_DATASETS_PATH, library.config.HF_DATASETS_CACHE
        return _arrow(builder.as_dataset(split=choose(builder.info.splits)), data, tuple(map(str, caches)))


def _arrow(dataset: Any, data: str, roots: tuple[str, ...] = ()) -> HfFiles:
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    if not files:
        raise UserError(f"{data}: the split has no rows")
    return HfFiles("arrow", files, dataset.features, roots)


def _parquet_features(path: Path) -> Any:
    """The features that the library wrote into a parquet file, else those of its columns' types."""
    pyarrow = needs("pyarrow", extra="datasets", what="reading parquet")
    parquet = needs("pyarrow.parquet", extra="datasets", what="reading parquet")
    of_schema = _library().Features.from_arrow_schema
    with _said(str(path)):
        schema = parquet.read_schema(path)
        try:
            return of_schema(schema)
        except ValueError:  # a map, which the library does not know
            found = dict[str, Any]()
            for field in schema:
                try:
                    found |= of_schema(pyarrow.schema([field]))
                except ValueError:
                    found[field.name] = _Unknown(str(field.type))
            return found


def _split_among(splits: Iterable[str], split: str, data: str, lone: bool = False) -> str:
    names = list(map(str, splits))
    if split in names or (lone and len(names) == 1):
        return split if split in names else names[0]
    raise UserError(f"{data}: has no split {split!r}; --split may be {', '.join(names)}")


def _library() -> Any:
    library = needs("datasets", extra="datasets", what="reading Hugging Face data sets")
    library.disable_progress_bars()
    return library


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turns what the library raises into a UserError of one line; its exceptions are of every class there is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        text = " ".join(str(told).split())[:300] or type(told).__name__
        raise UserError(f"{what}: the datasets library cannot read it ({text})") from error


def kinds_of(features: Any) -> Kinds:
    """What columns hold, by the library's features."""
    kinds = {name: "image" if _is_image(kind) else "text" if _is_text(kind) else "" for name, kind in features.items()}
    kinds |= {
        name: "image" if is_image_name(name, features) else "bytes" if kind is inner else ""
        for name, kind in features.items()
        if _type(inner := _inner(kind)) == "Value" and "binary" in inner.dtype
    }
    labels = {name: list(map(str, kind.names)) for name, kind in features.items() if _type(kind) == "ClassLabel"}
    return Kinds(kinds, labels)


def _type(feature: Any) -> str:
    """The library's class of a feature, without importing it: Value, ClassLabel, Image, List …"""
    return type(feature).__name__


def _inner(feature: Any) -> Any:
    """What a list holds, or the feature itself."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)


def _is_image(feature: Any) -> bool:
    inner = _inner(feature)
    return _type(inner) == "Image" or (isinstance(inner, dict) and set(inner) == {"bytes", "path"})


def _is_text(feature: Any) -> bool:
    inner = _inner(feature)
    if isinstance(inner, dict):
        return set(inner) != {"bytes", "path"} and any(map(_is_text, inner.values()))
    return _type(inner) == "Translation" or "string" in str(getattr(inner, "dtype", ""))
