"""CSV, TSV and JSON lines, read piece by piece.

A piece is a range of bytes that holds whole rows, so that many processes can read a file and memory does not grow with
it. A gzip file cannot be read from the middle, so it is one piece.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.records import Dropped, Row, file_stat, objects

_LINES = 16 * 2**20  # bytes of JSON lines in a piece
_FIELD = 16 * 2**20  # characters in a line or field at most
_MARKS = (",", ";", "\t", "|")  # delimiters that are tried if none is given
_EVEN_ROWS = 20  # rows that decide if the first line allows several delimiters
_QUOTED = 1000  # lines of one row at most; more means an unclosed quote
_OPEN = f"quote that nobody closed, or over {_QUOTED} lines of text in quotes"

csv.field_size_limit(_FIELD)


def table_pieces(path: str | Path, rows: int, *, delimiter: str = "", charset: str = "utf-8") -> Iterator[JsonObject]:
    """Pieces of `rows` rows of a table (the delimiter is guessed if it is not given) or of a JSON lines file, gzip or
    not.

    Raises:
        UserError: the file cannot be read, is empty, or is UTF-16.
    """
    path = Path(path)
    stamped = checked_file_stat(path)
    if is_json_lines(path):
        for piece in line_pieces(path):
            yield {**piece, "format": "jsonl"}
        return
    delimiter = _delimiter(path, delimiter, charset)
    whole = {"file": str(path), **stamped, "format": "table", "delimiter": delimiter, "charset": charset}
    if path.suffix == ".gz":
        yield {**whole, "start": 0, "end": None}
        return
    with path.open("rb") as file:
        lines = _Lines(file, charset)
        read = _rows(lines, delimiter)
        next(read, None)
        start, line = lines.end, lines.number
        for _ in iter(lambda: list(islice(read, rows)), []):
            yield {**whole, "start": start, "end": lines.end, "line": line}
            start, line = lines.end, lines.number


def table_columns(path: str | Path, delimiter: str = "", charset: str = "utf-8") -> list[str]:
    """The columns that the first line of a CSV or TSV file names.

    Raises:
        UserError: the file cannot be read or unpacked, its first line is broken, `delimiter` is not one character or
            `charset` cannot be read line by line, or the delimiter is ambiguous.
    """
    path = Path(path)
    checked_file_stat(path)
    _check_charset(charset)
    try:
        with open_bytes(path) as file:
            columns = next(_rows(_Lines(file, charset), _delimiter(path, delimiter, charset)), [])
    except _PACKED as error:
        raise UserError(f"{path}: its first line cannot be unpacked ({error}); expected gzip, whole") from error
    if isinstance(columns, str):
        advice = "; if Excel wrote it, say --charset cp1252" if columns == _NO_TEXT else ""
        raise UserError(f"{path}: its first line names no columns ({columns}){advice}")
    return columns


def _check_charset(charset: str) -> None:
    """UserError for one that Python does not know, or whose line ends and marks are not those of ASCII (UTF-16): rows
    are found by them."""
    try:
        codecs.lookup(charset)
    except LookupError as error:
        raise UserError(f"--charset {charset}: no such character set; utf-8 and cp1252 are the usual ones") from error
    plain = "".join((*_MARKS, '"\r\n'))
    try:
        alike = plain.encode("ascii").decode(charset) == plain
    except (LookupError, ValueError):  # of those that are no character sets ("hex"), or ask for another form
        alike = False
    if not alike:
        raise UserError(f"--charset {charset}: cannot be read line by line; convert the file (`iconv -t UTF-8`)")


def line_pieces(path: str | Path) -> Iterator[JsonObject]:
    """Pieces of whole lines, of some megabytes."""
    path = Path(path)
    stamped = checked_file_stat(path)
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
    """The rows of a piece of `table_pieces`, each a dict of its columns."""
    if piece["format"] == "jsonl":
        yield from objects(read_lines(piece))
        return
    path, delimiter = Path(piece["file"]), piece["delimiter"]
    with open_bytes(path) as file:
        charset = piece["charset"]
        lines = _Lines(file, charset)
        try:
            columns = next(_rows(lines, delimiter), [])
            if piece["start"]:
                file.seek(piece["start"])
                lines = _Lines(file, charset, piece["start"], piece["end"], piece["line"])
            for values in _rows(lines, delimiter):
                where = f"{path.name}, line {lines.first}"
                if isinstance(values, str):
                    yield Dropped(values, where)
                elif len(values) > len(columns):
                    yield Dropped("more values than columns", where)
                elif values:  # an empty line is no row
                    yield where, dict(zip(columns, values, strict=False))
        except _PACKED as error:
            yield _cut(path, error)


def read_lines(piece: JsonObject) -> Iterator[Row | Dropped]:
    """The JSON values of a piece of `line_pieces`."""
    path = Path(piece["file"])
    with open_bytes(path) as file:
        file.seek(piece["start"])
        place, number = piece["start"], 0
        while piece["end"] is None or place < piece["end"]:
            try:
                line, length = _line(file)
            except _PACKED as error:
                yield _cut(path, error)
                return
            if not length:
                return
            number += 1
            where = f"{path.name}, line {number}" + (f" after byte {piece['start']}" if piece["start"] else "")
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
                yield Dropped("not UTF-8", where)
            except ValueError:
                yield Dropped("not JSON", where)


def open_bytes(path: Path) -> IO[bytes]:
    """A file, unpacked if its name ends in .gz. UserError if it cannot be read."""
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def is_json_lines(path: Path) -> bool:
    """Whether the name ends in .jsonl or .ndjson, also with .gz."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _delimiter(path: Path, given: str, charset: str) -> str:
    """The given delimiter, with \\t for a tab, or the one that the first line shows (Excel writes semicolons where
    numbers have a decimal comma). UserError if it is not one character, or if the rows do not tell which of two it is.
    """
    if given:
        mark = "\t" if given == "\\t" else given
        if len(mark) != 1 or mark in '"\r\n':
            raise UserError(f"delimiter {given!r}: expected one character, or \\t for a tab")
        return mark
    rows = {mark: _first_rows(path, mark, charset) for mark in _MARKS}
    parting = [mark for mark in _MARKS if rows[mark] and len(rows[mark][0]) > 1]
    by_name = "\t" if path.name.lower().removesuffix(".gz").endswith((".tsv", ".txt")) else ","
    if not parting or (by_name == "\t" and by_name in parting):
        return by_name
    if len(parting) > 1:  # such as a comma in a caption: by the right one all rows have as many columns
        parting = [mark for mark in parting if len({len(row) for row in rows[mark]}) == 1] or parting
    if len(parting) > 1:
        raise UserError(f"{path}: its columns may be parted by {' or '.join(map(repr, parting))}; say --delimiter")
    return parting[0]


def _first_rows(path: Path, delimiter: str, charset: str) -> list[list[str]]:
    """The first rows by a delimiter, without broken ones."""
    with open_bytes(path) as file:
        found = islice(_rows(_Lines(file, charset), delimiter), 1 + _EVEN_ROWS)
        return [row for row in found if row and not isinstance(row, str)]


_NO_TEXT = "not UTF-8"
_PACKED = (EOFError, zlib.error, gzip.BadGzipFile)


def _cut(path: Path, error: Exception) -> Dropped:
    return Dropped("rest of a packed file that is cut short or damaged", f"{path.name} ({error})")


def _line(file: IO[bytes]) -> tuple[bytes | None, int]:
    """The next line and its length in bytes; None for a line that is too long, which is skipped."""
    line = file.readline(_FIELD)
    length = len(line)
    if length < _FIELD or line.endswith(b"\n"):
        return line, length
    while rest := file.readline(_FIELD):
        length += len(rest)
        if rest.endswith(b"\n"):
            break
    return None, length


def _rows(lines: _Lines, delimiter: str) -> Iterator[list[str] | str]:
    """The values of each row, or its fault. An unclosed quote costs its own line only.

    Such a quote swallows the following lines up to the next quote. The row counts as broken if neither a delimiter nor
    the end of the line follows that quote, if there is no such quote, or if a tab-separated table has tabs in the
    swallowed lines; then the lines are given back and read as rows.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.row = []
        values: list[str] | str | None
        try:
            values = next(reader, None)
            swallowed = delimiter == "\t" and any("\t" in value.partition("\n")[2] for value in values or ())
        except csv.Error:
            swallowed = True
        if swallowed:
            lines.give_back()
            values = _row_of(lines.row[0].text, delimiter)
        if values is None:
            return
        yield next((line.fault for line in lines.row if line.fault), values)


def _row_of(line: str, delimiter: str) -> list[str] | str:
    """The values of a single line, with quotes inside quotes kept; or its fault."""
    alone = csv.reader([line, ""], delimiter=delimiter)
    try:
        values = next(alone)
    except csv.Error:
        return "broken row"
    return values if alone.line_num == 1 else _OPEN


@dataclass(frozen=True, slots=True)
class _Line:
    """A line as text, its length in bytes, and its fault if it has one."""

    text: str
    length: int
    fault: str | None = None


class _Lines:
    """Lines of a binary file; those of the current row can be given back.

    row: the lines since it was last emptied. end: the byte after the last line. number: lines before the next one.
    """

    def __init__(self, file: IO[bytes], charset: str, start: int = 0, stop: int | None = None, number: int = 0) -> None:
        self._file, self._charset, self._stop = file, charset, stop
        self._given_back: list[_Line] = []
        self.end, self.number = start, number
        self.row: list[_Line] = []

    @property
    def first(self) -> int:
        """Number of the row's first line, from 1."""
        return self.number - len(self.row) + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.row) == _QUOTED:
            raise csv.Error(_OPEN)
        line = self._given_back.pop() if self._given_back else self._read()
        self.row.append(line)
        self.end += line.length
        self.number += 1
        return line.text

    def give_back(self) -> None:
        """Return all but the first line of the row to the input."""
        again = self.row[1:]
        self._given_back += reversed(again)
        self.end -= sum(line.length for line in again)
        self.number -= len(again)
        del self.row[1:]

    def _read(self) -> _Line:
        line, length = _line(self._file) if self._stop is None or self.end < self._stop else (b"", 0)
        if not length:
            raise StopIteration
        if line is None:
            return _Line("\n", length, "line too long")
        if self.end == 0:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{self._file.name}: is UTF-16; convert it (`iconv -f UTF-16 -t UTF-8`)")
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.replace(b"\0", b"")
        try:
            return _Line(line.decode(self._charset), length)
        except UnicodeError:  # not all raise UnicodeDecodeError
            fault = _NO_TEXT if self._charset == "utf-8" else f"not in {self._charset}"
            return _Line(line.decode("utf-8", errors="replace"), length, fault)


def checked_file_stat(path: Path) -> JsonObject:
    """What `file_stat` gives. UserError if there is nothing to read."""
    try:
        stamped = file_stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.is_dir() or not stamped["bytes"]:
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'empty'}; expected a file with rows")
    return stamped
