"""WIT, the Wikipedia image-text set: its TSV with a folder of images, or an img2dataset download of it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.dialects import Said
from data_prep.sources.folder import inside
from data_prep.sources.img2dataset import image_record, read_shard, shard_pieces
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, option
from data_prep.sources.tables import Table, open_table, read_table
from data_prep.sources.texts import files_in

COLUMNS = tuple(
    "language page_url image_url page_title section_title hierarchical_section_title caption_reference_description "  # noqa: SIM905
    "caption_attribution_description caption_alt_text_description mime_type original_height original_width "
    "is_main_image attribution_passes_lang_id page_changed_recently context_page_description "
    "context_section_description".split()
)
_SHORT = "caption_reference_description"
_LONG = (_SHORT, "page_title", "section_title", "context_page_description", "context_section_description")
_ROWS = 5000
_HASHED = 2**20  # addresses at a time
_SHARED = 1000  # names that several addresses share, at most


@dataclass(frozen=True)
class Wit:
    """WIT: its TSV with a folder of images, or an img2dataset download that kept its columns

    The short caption is the reference description; the long one is caption, page title, section title, page
    description and section description, in this order. The TSV holds URLs only. Either fetch them with
    `img2dataset --input_format tsv --url_col image_url --caption_col caption_reference_description
    --save_additional_columns '["language", "page_title", "section_title", "context_page_description",
    "context_section_description"]'` and name the folder, or give the files by --images. img2dataset calls the column of
    --caption_col "caption" and cannot save it a second time: that is the reference description then.
    """

    image: ClassVar[ImageRule | None] = ImageRule()

    paths: tuple[str, ...] = argument("TSV files (also .gz) or folders of them; or one img2dataset folder")
    images: str = option(
        "", "folder of the images, each named as the last part of its address, or under more of its path"
    )

    def pieces(self) -> Iterator[JsonObject]:
        if len(self.paths) == 1 and any(Path(self.paths[0]).glob("*_stats.json")):
            yield from shard_pieces(self.paths[0])
            return
        if not self.images:
            raise UserError("WIT's TSV holds addresses alone; name the folder of the images (--images)")
        tables = []
        for path in files_in(self.paths, (".tsv", ".tsv.gz")):
            table = open_table(path, Said("\t", "double", "none", "utf-8"))
            missing = [name for name in COLUMNS if name not in table.columns]
            if missing:
                raise UserError(
                    f"{path}: lacks WIT's columns {', '.join(missing)}; expected its TSV with the first line"
                )
            tables.append(table)
        shared = _shared_names(tables, Path(self.images))
        for table in tables:
            yield from ({**piece, "shared": shared} for piece in table.pieces(_ROWS))

    def read(self, piece: JsonObject) -> Iterator[Found]:
        if "stats" in piece:
            for found in read_shard(piece):
                if not isinstance(found, tuple):
                    yield found
                    continue
                where, sample, fields = found
                short, long = _captions({**fields, _SHORT: fields.get(_SHORT) or fields.get("caption")})
                if short or long:
                    yield image_record(where, sample, fields, short=short, long=long)
                else:
                    yield Dropped("no caption", where)
        else:
            shared = frozenset(piece["shared"])
            yield from from_rows(read_table(piece), lambda where, values: self._record(where, values, shared))

    def _record(self, where: str, values: JsonObject, shared: Collection[str]) -> Iterator[Found]:
        url = values.get("image_url") or ""
        steps = _steps(url)
        path = _image(Path(self.images), steps) if steps else None
        short, long = _captions(values)
        if path is None:
            yield Dropped("no image address", where)
        elif steps[-1] in shared and path == inside(Path(self.images), steps[-1]):
            yield Dropped("image by a name that several addresses share; keep it under its address's path", where)
        elif not short and not long:
            yield Dropped("no caption", where)
        else:
            yield ImageRecord(where, url, path, short, long)


def _steps(url: str) -> list[str]:
    """The path of an address, step by step; nothing if it names no file."""
    try:
        steps = [unquote(step) for step in urlsplit(url).path.split("/")]
    except ValueError:  # "http://[": half an IPv6 address
        return []
    return [step for step in steps if step] if steps[-1] else []


def _image(images: Path, steps: Sequence[str]) -> Path | None:
    """The file of an address: under as much of its path as there is in the folder, at least its last name. None if the
    name leads out of the folder."""
    for first in range(len(steps) - 1):
        path = inside(images, "/".join(steps[first:]))
        if path is not None and path.is_file():
            return path
    return inside(images, steps[-1])


def _shared_names(tables: Sequence[Table], images: Path) -> list[str]:
    """The last names that several addresses share, of which the folder has one file: nobody knows whose it is.

    Memory: 16 bytes an image.

    Raises:
        UserError: there are too many of them for a mistake.
    """
    import numpy as np

    known = np.empty((0, 2), np.uint64)
    for found in _hashed(tables):
        known = np.unique(np.concatenate([known, np.array([pair for _, pair in found], np.uint64)]), axis=0)
    names, counts = np.unique(known[:, 0], return_counts=True)
    twice = set(names[counts > 1].tolist())
    shared = {name for found in _hashed(tables) for name, (own, _) in found if own in twice} if twice else set()
    there = sorted(name for name in shared if (path := inside(images, name)) is not None and path.is_file())
    if len(there) > _SHARED:
        raise UserError(
            f"{images}: {len(there)} files have names that several addresses share, such as {there[0]}; keep them "
            "under the paths of their addresses (wikipedia/commons/a/a1/NAME)"
        )
    return there


def _hashed(tables: Sequence[Table]) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """Last names of addresses, each with hashes of name and address, some at a time."""
    rows = (row for table in tables for piece in table.pieces(_ROWS) for row in read_table(piece))
    urls = (row[1].get("image_url") or "" for row in rows if not isinstance(row, Dropped))
    named = ((steps[-1], (_hash(steps[-1]), _hash(url))) for url in urls if (steps := _steps(url)))
    while some := list(islice(named, _HASHED)):
        yield some


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _captions(values: JsonObject) -> tuple[list[Text], list[Text]]:
    """Short and long caption of a row, each at most one."""
    language = values.get("language")
    language = language if isinstance(language, str) and language else "und"
    texts = {name: value.strip() for name in _LONG if isinstance(value := values.get(name), str) and value.strip()}
    short = [Text(texts[_SHORT], language, "name")] if _SHORT in texts else []
    parts = list(dict.fromkeys(texts.values()))  # the section's title is often the page's
    described = any(name in texts for name in _LONG[3:])  # titles alone are no long text
    return short, [Text("\n".join(parts), language, "long", "human:joined")] if described else []
