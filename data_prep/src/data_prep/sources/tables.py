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
from data_prep.sources.packed import PACKED, is_packed, unpacked_name
from data_prep.sources.packed import open_bytes as open_bytes
from data_prep.sources.records import Dropped, Noted, Row, file_stat, objects
from data_prep.sources.table_rows import FIELD, Dialect, Lines, TableRow, next_line, rows

_LINES = 16 * 2**20  # bytes of JSON lines in a piece
_FIELD = FIELD  # bytes in a line of JSON at most
_SHOWN = 30  # columns in a message
_HEAD = 2**16  # bytes that show whether a file has JSON lines
_SHAPE = 20  # rows that show whether they have a value more than the first line
_NUMBERED = ("id", "_id", "idx", "index", "no", "nr", "number", "n", "#", "row", "")  # names of columns of numbers
_ROW_NAMES, _ENDS = "row names", "a delimiter at the ends of rows"


@dataclass(frozen=True)
class Table:
    """A CSV or TSV file whose dialect is known. Without a header the columns are called 1, 2, …"""

    path: Path
    dialect: Dialect
    header: bool
    columns: Sequence[str]
    more: str = ""  # what the value is that rows have and the header has not

    def pieces(self, count: int) -> Iterator[JsonObject]:
        """Pieces of so many rows."""
        whole = {
            "file": str(self.path),
            **checked_file_stat(self.path),
            "format": "table",
            "dialect": asdict(self.dialect),
            "header": self.header,
            "more": self.more,
        }
        found = {"read as": described(self.dialect, header=self.header, more=self.more)}  # once a file
        if self.dialect.whole or is_packed(self.path):
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
            found = islice(rows(Lines(file, dialect), dialect), dialect.skip, dialect.skip + 1 + _SHAPE)
            first = next(found, None)
            try:
                following = [row.values for row in found if isinstance(row.values, list) and row.values != [""]]
            except PACKED:  # said where it is read
                following = []
    except PACKED as error:
        raise UserError(f"{path}: its first line cannot be unpacked ({error}); expected it whole") from error
    columns = [] if first is None else first.values
    if isinstance(columns, str):
        raise UserError(f"{path}: its first line names no columns ({columns}); say --no-header if it is a row")
    more = _more(columns, following) if said.header else ""
    return Table(path, dialect, said.header, _names(columns, header=said.header, more=more), more)


def _more(columns: Sequence[str], following: Sequence[Sequence[str]]) -> str:
    """What all rows have more than the header: R writes numbers of rows before them, others a delimiter behind them."""
    if len(columns) < 2 or not following or any(len(row) != len(columns) + 1 for row in following):
        return ""
    if not any(row[-1] for row in following):
        return _ENDS
    if columns[0].strip().lower() in _NUMBERED:  # then the value too many is in a text, whose comma is not quoted
        return ""
    first = following[0][0]
    counted = first.isdecimal() and all(row[0] == str(int(first) + number) for number, row in enumerate(following))
    return _ROW_NAMES if counted else ""


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


def unknown(columns: Sequence[str]) -> str:
    """For a message: that none of a table's columns is known, and why that may be."""
    one = ", the only column (if that is several, say what parts them: --delimiter)" if len(columns) == 1 else ""
    return f"none of {shown(columns)}{one} is known"


def line_pieces(path: str | Path) -> Iterator[JsonObject]:
    """Pieces of whole lines, of some megabytes. UserError if the first ones are no JSON lines: UTF-16, or values that
    go on over several lines."""
    path = Path(path)
    stamped = checked_file_stat(path)
    with open_bytes(path) as file:
        try:
            head = file.read(_HEAD)
        except PACKED:  # said where it is read
            head = b""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or b"\0" in head[:4]:
        raise UserError(f"{path}: is UTF-16 or UTF-32; JSON lines are UTF-8: `iconv -f UTF-16 -t UTF-8` makes it so")
    if _goes_on(head):
        raise UserError(
            f"{path}: its values go on in the next line or are parted by commas; expected one in each line, or a list: "
            "`jq -c .` writes lines, `jq -c '.data[]'` those of a list under a name"
        )
    if is_packed(path):
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


def _goes_on(head: bytes) -> bool:
    """Whether the first lines end as JSON does that goes on in the next line, and none is a value."""
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n")[:-1] if line.strip()][:3]
    return len(lines) > 1 and lines[0].rstrip().endswith((b"{", b"[", b",")) and not any(map(_is_json, lines))


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


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
            named = first.values if first and isinstance(first.values, list) else []
            columns = _names(named, header=piece["header"], more=piece["more"])
            if piece["start"]:
                file.seek(piece["start"])
                lines = Lines(file, dialect, piece["start"], piece["end"], piece["line"])
            elif first and not piece["header"]:
                yield from _row(name, columns, first)
            for row in rows(lines, dialect):
                if piece["header"] and _is_header(row.values, named):
                    yield Dropped("the table's first line again", f"{name}, line {row.first}", content=row.values)
                else:
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


def _is_header(values: list[str] | str, header: list[str]) -> bool:
    """Whether a row is the header of another file that was put behind this one, perhaps with its byte order mark."""
    return bool(header) and values[0].removeprefix("\ufeff") == header[0] and values[1:] == header[1:]


def _names(values: list[str], *, header: bool, more: str) -> list[str]:
    if not header:
        return [str(number) for number in range(1, len(values) + 1)]
    names = [value.strip() for value in values]
    return ["", *names] if more == _ROW_NAMES else [*names, ""] if more == _ENDS else names


def read_lines(piece: JsonObject) -> Iterator[Row | Dropped]:
    """The JSON values of a piece of `line_pieces`."""
    path = Path(piece["file"])
    with open_bytes(path) as file:
        if piece["start"]:
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
    """Whether the name ends in .jsonl or .ndjson, also packed."""
    return unpacked_name(path.name).endswith((".jsonl", ".ndjson"))


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
