"""CSV, TSV and JSON lines, read piece by piece.

A piece is a range of bytes that holds whole rows, so that many processes can read a file and memory does not grow with
it. A gzip file cannot be read from the middle, so it is one piece; nor can UTF-16.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.dialects import Said, described, find_dialect
from data_prep.sources.records import Dropped, Noted, Row, file_stat, objects
from data_prep.sources.table_rows import FIELD, PACKED, Dialect, Lines, TableRow, next_line, rows
from data_prep.sources.table_rows import open_bytes as open_bytes

_LINES = 16 * 2**20  # bytes of JSON lines in a piece
_FIELD = FIELD  # bytes in a line of JSON at most
_SHOWN = 30  # columns in a message


@dataclass(frozen=True)
class Table:
    """A CSV or TSV file whose dialect is known. Without a header the columns are called 1, 2, …"""

    path: Path
    dialect: Dialect
    header: bool
    columns: Sequence[str]

    def pieces(self, count: int) -> Iterator[JsonObject]:
        """Pieces of so many rows."""
        whole = {
            "file": str(self.path),
            **checked_file_stat(self.path),
            "format": "table",
            "dialect": asdict(self.dialect),
            "header": self.header,
        }
        found = {"read as": described(self.dialect, header=self.header)}  # once a file
        if self.path.suffix == ".gz" or self.dialect.whole:
            yield {**whole, **found, "start": 0, "end": None}
            return
        with self.path.open("rb") as file:
            lines = Lines(file, self.dialect)
            read = rows(lines, self.dialect)
            for _ in islice(read, self.dialect.skip + self.header):
                pass
            start, line = lines.end, lines.number
            for _ in iter(lambda: list(islice(read, count)), []):
                yield {**whole, **found, "start": start, "end": lines.end, "line": line}
                start, line, found = lines.end, lines.number, {}


def open_table(path: str | Path, said: Said) -> Table:
    """A table, with what its first line says.

    Raises:
        UserError: the file cannot be read or unpacked, its first line is broken, or as of `find_dialect`.
    """
    path = Path(path)
    checked_file_stat(path)
    try:
        dialect = find_dialect(path, said)
        with open_bytes(path) as file:
            first = next(islice(rows(Lines(file, dialect), dialect), dialect.skip, None), None)
    except PACKED as error:
        raise UserError(f"{path}: its first line cannot be unpacked ({error}); expected gzip, whole") from error
    columns = [] if first is None else first.values
    if isinstance(columns, str):
        raise UserError(f"{path}: its first line names no columns ({columns}); say --no-header if it is a row")
    return Table(path, dialect, said.header, _names(columns, header=said.header))


def check_columns(path: Path, columns: Sequence[str], used: Iterable[str]) -> None:
    """UserError if a table lacks one of the columns that are used, or has two of the name."""
    counts = Counter(columns)
    if missing := [name for name in used if not counts[name]]:
        raise UserError(f"{path}: has no column {', '.join(missing)}; it has {shown(columns)}")
    if twice := [name for name in used if counts[name] > 1]:
        raise UserError(f"{path}: has {counts[twice[0]]} columns called {twice[0]!r}; give each a name of its own")


def shown(columns: Sequence[str]) -> str:
    """The names of columns for a message."""
    more = f", … ({len(columns)} in all)" if len(columns) > _SHOWN else ""
    return ", ".join(name[:80] for name in columns[:_SHOWN]) + more


def noted(piece: JsonObject) -> list[Noted]:
    """For the receipt: how the table of a first piece is read."""
    return [Noted(f"tables read as: {piece['read as']}")] if piece.get("read as") else []


def line_pieces(path: str | Path) -> Iterator[JsonObject]:
    """Pieces of whole lines, of some megabytes. UserError if it is UTF-16 or UTF-32, by its mark."""
    path = Path(path)
    stamped = checked_file_stat(path)
    with open_bytes(path) as file:
        try:
            wide = file.read(4).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
        except PACKED:  # said where it is read
            wide = False
    if wide:
        raise UserError(f"{path}: is UTF-16 or UTF-32; JSON lines are UTF-8: `iconv -f UTF-16 -t UTF-8` makes it so")
    if path.suffix == ".gz":
        yield {"file": str(path), **stamped, "start": 0, "end": None}
        return
    with path.open("rb") as file:
        start = 0
        while start < stamped["bytes"]:
            file.seek(min(stamped["bytes"], start + _LINES))
            _line(file)
            end = file.tell()
            yield {"file": str(path), **stamped, "start": start, "end": end}
            start = end


def read_table(piece: JsonObject) -> Iterator[Row | Dropped]:
    """The rows of a piece of a table, or of JSON lines, each a dict of its columns."""
    if piece["format"] == "jsonl":
        yield from objects(read_lines(piece))
        return
    path, dialect = Path(piece["file"]), Dialect(**piece["dialect"])
    name = piece.get("shown", path.name)
    with open_bytes(path) as file:
        try:
            lines = Lines(file, dialect)
            first = next(islice(rows(lines, dialect), dialect.skip, None), None)
            columns = _names(first.values if first and isinstance(first.values, list) else [], header=piece["header"])
            if piece["start"]:
                file.seek(piece["start"])
                lines = Lines(file, dialect, piece["start"], piece["end"], piece["line"])
            elif first and not piece["header"]:
                yield from _row(name, columns, first)
            for row in rows(lines, dialect):
                yield from _row(name, columns, row)
        except PACKED as error:
            yield _cut(path, error)


def _row(name: str, columns: list[str], row: TableRow) -> Iterator[Row | Dropped]:
    where = f"{name}, line {row.first}"
    if isinstance(row.values, str):
        yield Dropped(row.values, where, content=row.raw)
    elif len(row.values) > len(columns):
        yield Dropped("more values than columns", where, content=row.values)
    elif row.values != [""]:  # an empty line is no row
        yield where, dict(zip(columns, row.values, strict=False))


def _names(values: list[str], *, header: bool) -> list[str]:
    return [value.strip() for value in values] if header else [str(number) for number in range(1, len(values) + 1)]


def read_lines(piece: JsonObject) -> Iterator[Row | Dropped]:
    """The JSON values of a piece of `line_pieces`."""
    path = Path(piece["file"])
    with open_bytes(path) as file:
        file.seek(piece["start"])
        place, number = piece["start"], 0
        while piece["end"] is None or place < piece["end"]:
            try:
                line, length = _line(file)
            except PACKED as error:
                yield _cut(path, error)
                return
            if not length:
                return
            number += 1
            where = f"{piece.get('shown', path.name)}, line {number}" + (
                f" after byte {piece['start']}" if piece["start"] else ""
            )
            place += length
            if line is None:
                yield Dropped("line too long", where)
                continue
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            try:
                yield where, parse_json(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield Dropped("not UTF-8", where, content=line)
            except ValueError:
                yield Dropped("not JSON", where, content=line)


def is_json_lines(path: Path) -> bool:
    """Whether the name ends in .jsonl or .ndjson, also with .gz."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _cut(path: Path, error: Exception) -> Dropped:
    return Dropped("rest of a packed file that is cut short or damaged", f"{path.name} ({error})")


def _line(file: IO[bytes]) -> tuple[bytes | None, int]:
    return next_line(file, _FIELD)


def checked_file_stat(path: Path) -> JsonObject:
    """What `file_stat` gives. UserError if there is nothing to read."""
    try:
        stamped = file_stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.is_dir() or not stamped["bytes"]:
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'empty'}; expected a file with rows")
    return stamped
