"""Where corpus, queries and qrels of a retrieval set are, and their rows, whatever they are stored in."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.names import is_hidden
from data_prep.shards.format import JsonObject
from data_prep.sources.arrow import read_arrow
from data_prep.sources.hf_files import HfFiles, config_names, find_files
from data_prep.sources.packed import PACKED
from data_prep.sources.parquet import read_parquet
from data_prep.sources.records import Dropped, Row, file_stat, objects
from data_prep.sources.tables import open_bytes, read_lines

ID = ("_id", "id", "query-id", "corpus-id", "qid", "pid", "docid", "query_id", "corpus_id")
QRELS = ("query-id", "corpus-id", "score")

_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_TSV = (".tsv", ".tsv.gz")
# What the parts are called; "default" is MTEB's older name of the qrels' configuration, "data" a hub's folder of it.
_NAMES = {"corpus": ("corpus", "collection"), "queries": ("queries", "query"), "qrels": ("qrels", "default", "data")}


@dataclass(frozen=True)
class Part:
    """The files of corpus, queries or qrels. name: which of them. files: (form, path), with the forms of `HfFiles` and
    "tsv"."""

    name: str
    files: tuple[tuple[str, str], ...]

    def stamps(self) -> list[JsonObject]:
        """Name, size and time of each file."""
        return [{"file": path, **file_stat(Path(path))} for _, path in self.files]

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, JsonObject] | Dropped]:
        """Every row, with those of `columns` that it has."""
        for form, path in self.files:
            if form == "tsv":
                yield from _table(Path(path), self.name == "qrels")
                continue
            for piece in HfFiles(form, (Path(path),)).pieces(1_000_000):
                yield from objects(_rows(piece, columns))


def find_part(data: str, name: str, config: str, split: str) -> Part:
    """The part `name` ("corpus", "queries" or "qrels") of a folder, or of a data set on the hub.

    Args:
        config: what stands before a part's name ("de-corpus"); empty for none.
        split: of the qrels; the other parts may have it, too, or be whole.

    Raises:
        UserError: there is no such folder or name, or it lacks the part or the split.
    """
    root = Path(data)
    if not root.is_dir():
        return _on_the_hub(data, name, config, split)
    wanted = [f"{config}-{each}" if config else each for each in _NAMES[name]]
    files = sorted(
        path
        for path in root.rglob("*")
        if path.name.lower().endswith((*_LINES, *_TSV, ".parquet"))
        and not is_hidden(str(path.relative_to(root)))
        and path.is_file()
    )
    found: list[Path] = []
    for called in wanted:
        found = found or [path for path in files if _is_part(path.relative_to(root), called, name == "qrels")]
    if not found:
        seen = ", ".join(str(path.relative_to(root)) for path in files[:9]) or "no such file"
        raise UserError(f"{data}: no {wanted[0]} (.jsonl, .parquet, .tsv, or a folder of them); it has {seen}")
    of_split = [path for path in found if _split_of(path) == split]
    splits = {_split_of(path) for path in found}
    if of_split:
        found = of_split
    elif name == "qrels" and splits != {"qrels"}:
        raise UserError(f"{data}: has no judgements of the split {split!r}; --split may be {', '.join(sorted(splits))}")
    elif len(splits) > 1:
        raise UserError(f"{data}: {name} may be of {', '.join(sorted(splits))}, and none is called {split!r}")
    return Part(name, tuple((_form(path), str(path)) for path in found))


def _on_the_hub(data: str, name: str, config: str, split: str) -> Part:
    there = config_names(data)
    wanted = [f"{config}-{each}" if config else each for each in _NAMES[name]]
    called = next((each for each in wanted if each in there), None)
    if called is None:
        raise UserError(f"{data}: has no configuration {' or '.join(wanted)}; it has {', '.join(there)}")
    found = find_files(data, called, split, "", lone=name != "qrels")
    return Part(name, tuple((found.form, str(path)) for path in found.files))


def _form(path: Path) -> str:
    return "tsv" if path.name.lower().endswith(_TSV) else "parquet" if path.suffix == ".parquet" else "lines"


def _is_part(path: Path, called: str, judged: bool) -> bool:
    """Whether a file belongs to a part, by its path from the folder: corpus.jsonl, corpus/…, corpus-00000-of-….parquet,
    qrels/train.tsv, qrels.train.tsv."""
    first, name = path.parts[0], path.name
    if called == "data":
        return judged and first == "data" and not name.startswith(("corpus", "queries"))
    return (first == called and len(path.parts) > 1) or name.startswith((f"{called}.", f"{called}-0"))


def _split_of(path: Path) -> str:
    """The split in a file's name: train.tsv, train-00000-of-00001.parquet, qrels.train.tsv."""
    stem = path.name.partition(".")[0]
    inner = path.name.split(".")[1:-1]
    if inner and inner[0] not in ("jsonl", "ndjson", "tsv"):
        return inner[0]
    return "" if stem.isdigit() else stem.partition("-0")[0]


def _rows(piece: JsonObject, columns: Sequence[str]) -> Iterator[Row | Dropped]:
    if piece["format"] == "lines":
        return read_lines(piece)
    return (read_parquet if piece["format"] == "parquet" else read_arrow)(piece, columns)


def _table(path: Path, judged: bool) -> Iterator[tuple[str, JsonObject] | Dropped]:
    """Rows of a TSV. Judgements have three columns (BEIR) or four (TREC: the second says nothing); others id and text,
    as MS MARCO's collection.tsv, or what their first line names."""
    header: list[str] | None = None
    for number, row in enumerate(cells_of(path)):
        if isinstance(row, Dropped):
            yield row
            continue
        where, cells = row
        if number == 0 and (cells[0] in ID or cells[0] == "query-id"):
            header = cells
        elif judged:
            yield where, _judgement("\t".join(cells))
        elif header is None:
            yield where, {"id": cells[0], "text": "\t".join(cells[1:])}
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            yield Dropped("not as many values as columns", where, content=cells)


def cells_of(path: Path) -> Iterator[tuple[str, list[str]] | Dropped]:
    """The cells of each line of a TSV, whose texts are not quoted. UserError if it cannot be unpacked to its end."""
    number = 0
    with open_bytes(path) as file:
        try:
            for number, raw in enumerate(file, 1):
                where = f"{path.name}, line {number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    yield Dropped("not UTF-8", where, content=raw)
                else:
                    yield where, line.removesuffix("\n").removesuffix("\r").split("\t")
        except PACKED as error:
            raise UserError(f"{path}: cannot be unpacked after line {number} ({error}); expected it whole") from error


def _judgement(line: str) -> dict[str, Any]:
    cells = next(csv.reader([line], delimiter="\t"), [])
    cells = line.split() if len(cells) == 1 else cells
    return dict(zip(QRELS, [cells[0], *cells[2:]] if len(cells) == 4 else cells, strict=False))
