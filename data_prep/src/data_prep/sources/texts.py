"""Text pairs and triplets: JSON lines in the usual forms, tables and parquet files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.parquet import parquet_columns, parquet_pieces, read_parquet
from data_prep.sources.records import Dropped, Found, Noted, Row, TextRecord, argument, option, pick
from data_prep.sources.tables import line_pieces, read_lines, read_table, table_columns, table_pieces

_ROWS = 20_000
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", *_TABLES, ".parquet")
_QUERY = ("query", "anchor", "question", "sentence1", "text1", "source")
_TARGET = ("pos", "positive", "target", "answer", "document", "passage", "sentence2", "text2")
_NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_\d+)?")


@dataclass(frozen=True)
class Texts:
    """text pairs and triplets: JSON lines, CSV, TSV (also .gz) or parquet

    A JSON line is [query, target], [query, target, negative, …], {"set": [texts that say the same]}, or an object with
    the columns of a table: query, target, and the negatives in one list or in a column each, found by their usual names
    or named by options. With enough negatives a line becomes a triplet; with fewer a pair, which the
    receipt counts.
    """

    image: ClassVar[ImageRule | None] = None

    files: tuple[str, ...] = argument("files, or folders of files")
    language: str = option("und", "language of the texts, ISO 639-1; QUERY,TARGET for pairs across languages")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")
    negatives: int = option(7, "negatives of a triplet; what has more is cut")
    query_column: str = option("", f"column of the query (default: the first of {', '.join(_QUERY)})")
    target_column: str = option("", f"column of the target (default: the first of {', '.join(_TARGET)})")
    negative_columns: str = option("", "columns of negatives, with commas (default: negative, neg, negative_1, …)")
    delimiter: str = option("", "of a table's columns, one character or \\t (default: what parts the first line)")
    charset: str = option("utf-8", "character set of a CSV or TSV; Excel's plain CSV is often cp1252")

    def pieces(self) -> Iterator[JsonObject]:
        languages = self.language.split(",")
        if len(languages) > 2 or not all(languages):
            raise UserError(f"--language {self.language}: expected one language, or QUERY,TARGET (de,en)")
        if self.negatives < 1:
            raise UserError(f"--negatives {self.negatives}: expected at least 1")
        for path in files_in(self.files, _ENDINGS):
            if path.suffix.lower() == ".parquet":
                columns = self._needed(path, parquet_columns(path))
                for piece in parquet_pieces([path], _ROWS, columns=columns):
                    yield {**piece, "format": "parquet", "columns": columns}
            elif path.name.lower().endswith(_TABLES):
                self._needed(path, table_columns(path, self.delimiter, self.charset))
                yield from table_pieces(path, _ROWS, delimiter=self.delimiter, charset=self.charset)
            else:
                yield from line_pieces(path)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        first, _, second = self.language.partition(",")
        for row in _rows(piece):
            if isinstance(row, Dropped):
                yield row
                continue
            where, value = row
            parts = self._parts(value)
            if parts is None:
                yield Dropped("not one of the forms of pairs and triplets", where)
                continue
            query, target, negatives = ([text for text in part if text.strip()] for part in parts)
            if not query or not target:
                yield Dropped("empty text", where)
                continue
            enough = len(negatives) >= self.negatives
            if negatives and not enough:
                yield Noted(f"with fewer than {self.negatives} negatives, as pairs")
            yield TextRecord(
                where,
                self._texts(query, first),
                self._texts(target, second or first),
                [self._texts([text], second or first) for text in negatives[: self.negatives]] if enough else None,
            )

    def _parts(self, value: Any) -> tuple[list[str], list[str], list[str]] | None:
        """Query, targets and negatives of a line; None if it has another form."""
        if isinstance(value, list) and len(value) >= 2:
            parts = value[:1], value[1:2], value[2:]
        elif isinstance(value, dict) and isinstance(value.get("set"), list):
            parts = value["set"][:1], value["set"][1:], []
        elif isinstance(value, dict):
            negatives = [text for name in self._negatives(value) for text in _listed(pick(value, name, ()))]
            query, target = pick(value, self.query_column, _QUERY), pick(value, self.target_column, _TARGET)
            if query is None or target is None:
                return None
            parts = [query], _listed(target), negatives
        else:
            return None
        return parts if all(isinstance(text, str) for part in parts for text in part) else None

    def _negatives(self, columns: Iterable[str]) -> list[str]:
        """The columns that hold negatives."""
        if self.negative_columns:
            return self.negative_columns.split(",")
        return [name for name in columns if _NEGATIVE.fullmatch(name)]

    def _needed(self, path: Path, columns: list[str]) -> list[str]:
        """Those of a file's columns that are read. UserError if some are missing."""
        needed = self._negatives(columns)
        for what, named, usual in (("query", self.query_column, _QUERY), ("target", self.target_column, _TARGET)):
            found = named or next((name for name in usual if name in columns), None)
            if found is None:
                raise UserError(
                    f"{path}: none of {', '.join(columns)} is known for the {what}; name it: --{what}-column"
                )
            needed.append(found)
        if missing := [name for name in needed if name not in columns]:
            raise UserError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(columns)}")
        return needed

    def _texts(self, texts: list[str], language: str) -> list[Text]:
        return [Text(text, language, "body", self.origin) for text in texts]


def files_in(paths: tuple[str, ...], endings: tuple[str, ...]) -> list[Path]:
    """The given files, and files with these endings in the given folders, sorted. UserError if there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.name.lower().endswith(endings) and file.is_file() and not is_hidden(str(file.relative_to(path)))
            )
            if not inside:
                raise UserError(f"{path}: holds no {' or '.join(endings)} file")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def _rows(piece: JsonObject) -> Iterator[Row | Dropped]:
    if piece.get("format") == "parquet":
        return read_parquet(piece, piece["columns"], texts=piece["columns"])
    return read_table(piece) if piece.get("format") == "table" else read_lines(piece)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
