"""Rows of a CSV or TSV file in a known dialect: each value letter for letter, or the row's fault.

Not the standard library's csv: it takes a backslash before any character for an escape, drops quotes that stand inside
a text, and cannot say which row it was.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO, NamedTuple

FIELD = 16 * 2**20  # bytes of a line at most
MARKS = (",", ";", "\t", "|")  # delimiters that are tried if none is given
NO_TEXT = "not UTF-8"
_QUOTED = 1000  # lines of one row at most; more means an unclosed quote
_OPEN = f"quote that nobody closed, or over {_QUOTED} lines of text in quotes"
_AFTER = "text after a quote that closes"
_LETTERS = {"0": "\0", "b": "\b", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f", "Z": "\x1a"}  # of MySQL


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    quoting: "double" (RFC 4180: a value may stand in quotes, a quote in it is doubled) or "none" (quotes are text).
    escape: a character, or "": in quotes it stands before quotes and itself (Spark, R), without quoting also before
    delimiters, line ends and MySQL's letters (\\n, \\t, \\N). encoding: Python's name. newline: "\\r" for old Macs.
    skip: lines before the first row (Excel's sep=;).
    """

    delimiter: str
    quoting: str = "double"
    escape: str = ""
    encoding: str = "utf-8"
    newline: str = "\n"
    skip: int = 0

    @property
    def whole(self) -> bool:
        """Whether the file can be read from its beginning only: its lines are not those of ASCII."""
        return self.newline != "\n" or is_wide(self.encoding)

    @cached_property
    def inside(self) -> re.Pattern[str]:
        """What a value in quotes holds, up to the closing quote."""
        escape = re.escape(self.escape)
        return re.compile(rf'(?:[^"{escape}]|{escape}.|"")*+' if escape else r'(?:[^"]|"")*+', re.DOTALL)

    @cached_property
    def escaped(self) -> re.Pattern[str]:
        """An escape and what it stands before."""
        following = "." if self.quoting == "none" else rf'["{re.escape(self.escape + self.delimiter)}\r\n]'
        return re.compile(f"{re.escape(self.escape)}({following})", re.DOTALL)

    @cached_property
    def value(self) -> re.Pattern[str]:
        """A value without quotes in which the delimiter may be escaped, and the delimiter."""
        escape, mark = re.escape(self.escape), re.escape(self.delimiter)
        return re.compile(rf"((?:[^{escape}{mark}]|{escape}.)*+)({mark}|{escape}?\Z)", re.DOTALL)


def is_wide(encoding: str) -> bool:
    """Whether characters of ASCII take two or four bytes."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


class Line(NamedTuple):
    """A line as text, its length in bytes, and its fault if it has one."""

    text: str
    length: int
    fault: str | None = None


class Lines:
    """Lines of a binary file. end: the byte after the last line. number: of lines before the next one."""

    def __init__(
        self, file: IO[bytes], dialect: Dialect, start: int = 0, stop: int | None = None, number: int = 0
    ) -> None:
        self._file = _transcoded(file, dialect) if dialect.whole else file
        self._encoding = "utf-8" if dialect.whole else dialect.encoding
        self._stop, self._given_back = stop, list[Line]()
        self.end, self.number = start, number

    def take(self) -> Line | None:
        """The next line; None at the end."""
        line = self._given_back.pop() if self._given_back else self._read()
        if line is not None:
            self.end += line.length
            self.number += 1
        return line

    def give_back(self, lines: list[Line]) -> None:
        """The lines come again."""
        self._given_back += reversed(lines)
        self.end -= sum(line.length for line in lines)
        self.number -= len(lines)

    def _read(self) -> Line | None:
        line, length = next_line(self._file, FIELD) if self._stop is None or self.end < self._stop else (b"", 0)
        if not length:
            return None
        if line is None:
            return Line("\n", length, "line too long")
        if self.end == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return Line(line.decode(self._encoding), length)
        except UnicodeError:  # not all raise UnicodeDecodeError
            fault = NO_TEXT if self._encoding == "utf-8" else f"not in {self._encoding}"
            return Line(line.decode("utf-8", errors="replace"), length, fault)


class TableRow(NamedTuple):
    """The values of a row, or its fault. first: number of its first line, from 1; raw: its text, line end and all."""

    values: list[str] | str
    first: int
    raw: str


def rows(lines: Lines, dialect: Dialect) -> Iterator[TableRow]:
    """The rows of a table, the first line's as well. What is wrong in one costs that one: of a quote that nobody closes
    its own line."""
    while (line := lines.take()) is not None:
        first = lines.number
        taken = [line]
        if dialect.quoting == "none":
            values: list[str] | str = _unquoted(lines, taken, dialect)
        elif '"' in line.text:
            values = _quoted(lines, taken, dialect)
        else:
            values = [_missing(value, dialect) for value in content(line.text).split(dialect.delimiter)]
        if isinstance(values, str):
            lines.give_back(taken[1:])
            del taken[1:]
        elif dialect.newline == "\r":
            values = [value.replace("\n", "\r") for value in values]
        if len(taken) == 1:
            yield TableRow(line.fault or values, first, line.text)
        else:
            fault = next((one.fault for one in taken if one.fault), None)
            yield TableRow(fault or values, first, "".join(one.text for one in taken))


def content(text: str) -> str:
    """A line without its end; "\\r\\r\\n" is one that was written as "\\r\\n" to a text file of Windows."""
    return text.removesuffix("\n").rstrip("\r")


def _missing(value: str, dialect: Dialect) -> str:
    return "" if dialect.escape and value == f"{dialect.escape}N" else value


def _quoted(lines: Lines, taken: list[Line], dialect: Dialect) -> list[str] | str:
    """The values of a row in which quotes count; lines that it goes on in are added to `taken`."""
    values: list[str] = []
    text, at = taken[0].text, 0
    while True:
        if not text.startswith('"', at):
            end = text.find(dialect.delimiter, at)
            values.append(_missing(content(text[at:]) if end < 0 else text[at:end], dialect))
            if end < 0:
                return values
            at = end + 1
            continue
        parts, at = list[str](), at + 1
        while not text.startswith('"', end := dialect.inside.match(text, at).end()):  # type: ignore[union-attr]
            parts.append(text[at:])
            more = lines.take() if len(taken) < _QUOTED else None
            if more is None:
                return _OPEN
            taken.append(more)
            text, at = more.text, 0
        parts.append(text[at:end])
        if dialect.delimiter == "\t" and any("\t" in part for part in parts[1:]):
            return _OPEN  # a quote further down closed it
        values.append(_unescaped("".join(parts), dialect))
        at = end + 1
        if not text.startswith(dialect.delimiter, at):
            if content(text[at:]):
                return _OPEN if len(taken) > 1 else _AFTER
            return values
        at += 1


def _unquoted(lines: Lines, taken: list[Line], dialect: Dialect) -> list[str] | str:
    """The values of a row in which quotes are text."""
    text = taken[0].text
    if not dialect.escape or dialect.escape not in text:
        return content(text).split(dialect.delimiter)
    while text.endswith("\n") and _is_escaped(content(text), dialect.escape):
        more = lines.take() if len(taken) < _QUOTED else None
        if more is None:
            return "escape that stands before nothing"
        taken.append(more)
        text += more.text
    values = dialect.value.findall(content(text))
    end = next(number for number, (_, mark) in enumerate(values, 1) if mark != dialect.delimiter)
    return [_unescaped(_missing(value, dialect), dialect) for value, _ in values[:end]]


def _is_escaped(text: str, escape: str) -> bool:
    """Whether what follows a text is escaped: it ends in an odd number of escapes."""
    return bool((len(text) - len(text.rstrip(escape))) % 2)


def _unescaped(value: str, dialect: Dialect) -> str:
    if dialect.quoting == "none":
        return dialect.escaped.sub(lambda match: _LETTERS.get(match[1], match[1]), value)
    if not dialect.escape:
        return value.replace('""', '"')
    both = re.compile(f'{dialect.escaped.pattern}|(")"', re.DOTALL)
    return both.sub(lambda match: match[1] or match[2], value)


def next_line(file: IO[bytes], limit: int) -> tuple[bytes | None, int]:
    """The next line and its length in bytes; None for one of more than `limit` bytes, which is skipped."""
    line = file.readline(limit)
    length = len(line)
    if length < limit or line.endswith(b"\n"):
        return line, length
    while rest := file.readline(limit):
        length += len(rest)
        if rest.endswith(b"\n"):
            break
    return None, length


def _transcoded(file: IO[bytes], dialect: Dialect) -> IO[bytes]:
    """The file as UTF-8 with "\\n" at the ends of lines."""
    return io.BufferedReader(_Transcoded(file, dialect.encoding, dialect.newline), 2**16)


class _Transcoded(io.RawIOBase):
    def __init__(self, file: IO[bytes], encoding: str, newline: str) -> None:
        self._file, self._newline = file, newline.encode()
        # Halves of characters pass, and then are no UTF-8: that is the fault of their row.
        errors = "surrogatepass" if is_wide(encoding) else "strict"
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._left, self._done = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left and not self._done:
            raw = self._file.read(2**16)
            self._done = not raw
            try:
                text = self._decoder.decode(raw, final=self._done)
            except UnicodeDecodeError:  # the last character is cut
                text = "\udc80"
            self._left = text.encode("utf-8", "surrogatepass").replace(self._newline, b"\n")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
