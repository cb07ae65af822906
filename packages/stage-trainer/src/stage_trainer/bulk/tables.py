"""Text files, JSON lines, CSV, TSV and parquet: one cell of each row, with an id, a few rows in memory at a time."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_prep.shards import encodes

from stage_trainer.errors import UserError

_JSON, _CSV, _TSV = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), (".csv", ".csv.gz"), (".tsv", ".tsv.gz")
TABLES = (*_JSON, *_CSV, *_TSV, ".parquet")
_FIELD = 2**27  # bytes of a CSV cell; Python's own limit is 128 KiB
_BATCH = 64  # rows of a parquet file in memory: each may hold an image


@dataclass(frozen=True)
class Columns:
    """Which columns of tables are read: what is encoded, and the ids. Without the second, ids are FILE:NUMBER."""

    value: str | None = None
    id: str | None = None

    @property
    def named(self) -> str:
        """The options that state them."""
        return " and ".join(f"--{'column' if f == 'value' else 'id'}" for f in ("value", "id") if getattr(self, f))


class Cell(NamedTuple):
    """A row's id and value (a text, bytes, or whatever the table has), or why there is none."""

    id: str
    value: Any
    fault: str = ""


class Table(Protocol):
    def names(self) -> list[str]:
        """Its columns."""

    def count(self) -> int:
        """Its rows."""

    def __iter__(self) -> Iterator[Cell]: ...


def open_table(path: Path, columns: Columns) -> Table:
    """A text file or a table; `path` has one of their endings.

    Raises:
        UserError: it cannot be read, or lacks a column. So may reading it.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        table: Table = Parquet(path, columns)
    elif name.endswith(_JSON):
        table = JsonLines(path, columns)
    elif name.endswith((*_CSV, *_TSV)):
        table = Csv(path, columns, "\t" if name.endswith(_TSV) else ",")
    else:
        return Lines(path)
    wanted = [column for column in (columns.value, columns.id) if column is not None]
    there = table.names()
    if columns.value is not None and (missing := [column for column in wanted if column not in there]):
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(there) or 'none'}")
    return table


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Iterable[bytes]]:
    """The file, unpacked if it ends in .gz; UserError for what is wrong with it inside."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


class Lines:
    """A text file: every line is a value, with the id FILE:NUMBER."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        return []

    def count(self) -> int:
        with _reading(self.path) as file:
            return sum(1 for _ in file)

    def __iter__(self) -> Iterator[Cell]:
        with _reading(self.path) as file:
            for number, line in enumerate(file, 1):
                raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                name = _numbered(self.path, number)
                try:
                    yield Cell(name, raw.decode().rstrip("\r\n"))
                except UnicodeDecodeError as error:
                    yield Cell(name, None, f"the line is not UTF-8 ({error.reason})")


class JsonLines:
    """One JSON object a line."""

    def __init__(self, path: Path, columns: Columns):
        self.path, self.columns = path, columns

    def names(self) -> list[str]:
        return next((list(row) for _, row, _ in self._rows() if row is not None), [])

    def count(self) -> int:
        return sum(1 for _ in self._rows())

    def __iter__(self) -> Iterator[Cell]:
        for number, row, fault in self._rows():
            if row is None:
                yield Cell(_numbered(self.path, number), None, fault)
            elif self.columns.value not in row:
                yield Cell(_numbered(self.path, number), None, f"it has no {self.columns.value}")
            else:
                yield _cell(self.path, number, self.columns, row)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
        """(number of the line, its object, else what is wrong with it). Blank lines are none."""
        with _reading(self.path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row, fault = None, "it is no JSON object"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    fault = f"the line is not JSON ({type(error).__name__}: {str(error)[:200]})"
                yield number, row if isinstance(row, dict) else None, fault


class Csv:
    """Comma- or tab-separated, with a head. The first row below it has the number 1."""

    def __init__(self, path: Path, columns: Columns, delimiter: str):
        self.path, self.columns, self.delimiter = path, columns, delimiter

    def names(self) -> list[str]:
        return next(self._rows(), [])

    def count(self) -> int:
        return max(0, sum(1 for _ in self._rows()) - 1)

    def __iter__(self) -> Iterator[Cell]:
        rows = self._rows()
        head = next(rows, [])
        for number, row in enumerate(rows, 1):
            if len(row) != len(head):
                fault = f"the row has {len(row)} cells, the head {len(head)}"
                yield Cell(_numbered(self.path, number), None, fault)
            else:
                yield _cell(self.path, number, self.columns, dict(zip(head, row, strict=True)))

    def _rows(self) -> Iterator[list[str]]:
        csv.field_size_limit(_FIELD)
        with _reading(self.path) as file:
            # Bytes that are no UTF-8 become half characters, which `_cell` finds in what it takes.
            lines = (raw.decode("utf-8-sig" if n == 0 else "utf-8", "surrogateescape") for n, raw in enumerate(file))
            reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
            try:
                yield from filter(None, reader)
            except csv.Error as error:
                raise UserError(
                    f"{self.path}: line {reader.line_num} is no CSV ({error}); mend the file, or write it as JSON lines"
                ) from error


class Parquet:
    """A parquet file; an image may be bytes, or {bytes, path} as the datasets library has it."""

    def __init__(self, path: Path, columns: Columns):
        self.path, self.columns, self.library = path, columns, parquet_library()
        try:
            metadata = self.library.read_metadata(path)
        except failures() as error:
            raise UserError(f"{path} is no parquet file that can be read ({error})") from error
        self._count, self._names = metadata.num_rows, metadata.schema.to_arrow_schema().names

    def names(self) -> list[str]:
        return list(self._names)

    def count(self) -> int:
        return int(self._count)

    def __iter__(self) -> Iterator[Cell]:
        wanted = list(dict.fromkeys(name for name in (self.columns.value, self.columns.id) if name is not None))
        number = 0
        try:
            with self.library.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_BATCH, columns=wanted, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield _cell(self.path, number, self.columns, row)
        except UserError:
            raise
        except failures() as error:
            raise UserError(f"{self.path} is damaged after row {number:,} ({error}); write it again") from error


def parquet_library() -> Any:
    """pyarrow.parquet. UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow, which is not installed: pip install 'pyarrow>=23.0.1'") from error
    return pyarrow.parquet


def failures() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a file that it cannot read; some of its own errors are none of Python's."""
    import pyarrow

    return OSError, ValueError, pyarrow.ArrowException


def _cell(path: Path, number: int, columns: Columns, row: dict[str, Any]) -> Cell:
    value, name = row.get(str(columns.value)), _numbered(path, number)
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if columns.id is not None:
        stated = row.get(columns.id)
        if isinstance(stated, bool) or not isinstance(stated, str | int) or not encodes(str(stated)):
            return Cell(name, None, f"its id ({columns.id}) is {ascii(stated)[:80]}; expected a text or a number")
        name = str(stated)
    if isinstance(value, str) and not encodes(value):
        return Cell(name, None, "it is not UTF-8, or has half a character")
    return Cell(name, value)


def shown(path: str) -> str:
    """A path as text that can be stored: bytes of its name that are no UTF-8 become escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def _numbered(path: Path, number: int) -> str:
    return f"{shown(str(path))}:{number}"
