"""Which dialect a CSV or TSV file is written in: found from its bytes, or said by the user.

Spark, MySQL, Excel and Tatoeba write tables in ways that contradict each other. Where the bytes do not tell how a text
is meant, the user is asked: no text is changed by a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.encodings import encoding_of, head_of
from data_prep.sources.packed import PACKED, open_bytes, unpacked_name
from data_prep.sources.table_rows import MARKS, Dialect, Lines, TableRow, content, is_wide, rows

_EMPTY = 100  # lines before the first row
_EVEN_ROWS = 20  # rows that decide if the first line allows several delimiters
_LOOK_AT = 4 * 2**20  # characters by which quoting is found
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
# What the options of importers say of it.
DELIMITER = "of a table's columns, one character or \\t (default: what parts the first line)"
QUOTING = "double: values may stand in quotes; none: quotes are text (default: as the rows show)"
ESCAPE = "character that stands before quotes and delimiters in a text, or none (default: as the rows show)"
ENCODING = "of a table, such as utf-16 or cp1252, Excel's (default: by its bytes)"
NO_HEADER = "the first line of a table is a row; its columns are called 1, 2, …"


@dataclass(frozen=True)
class Said:
    """What the user says of a table; "" is found from its bytes. escape: "none" for none. header: whether the first
    line names the columns."""

    delimiter: str = ""
    quoting: str = ""
    escape: str = ""
    encoding: str = ""
    header: bool = True


def find_dialect(path: Path, said: Said) -> Dialect:
    """The dialect of a table.

    Raises:
        UserError: an option is none, the file cannot be read, or its bytes allow two readings; the message names the
            option that decides.
    """
    sample = head_of(path)
    encoding = encoding_of(path, sample, said.encoding)
    newline = "\n" if is_wide(encoding) else _newline(sample)
    escape = "" if said.escape == "none" else "\\" if said.escape == "\\\\" else said.escape
    if len(escape) > 1 or escape in ('"', "\r", "\n", "\t"):
        raise UserError(f"--escape {said.escape!r}: expected one character, such as \\, or none")
    base = Dialect(",", said.quoting or "double", escape, encoding, newline)
    first, empty = _first_line(path, base)
    hint = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's own
    base = replace(base, skip=empty + (1 if hint else 0))
    base = replace(base, delimiter=_delimiter(path, said.delimiter or (hint[1] if hint else ""), base))
    if not said.quoting:
        base = _with_quoting(path, base, said)
    if not said.escape and base.quoting == "none":
        base = replace(base, escape=_bare_escape(path, base))
    return base


def described(dialect: Dialect, *, header: bool, more: str = "") -> str:
    """For the receipt: "comma, quotes, utf-8"."""
    parts = [_NAMES.get(dialect.delimiter, repr(dialect.delimiter))]
    parts += ["quotes are text" if dialect.quoting == "none" else "values may be quoted"]
    parts += [f"{dialect.escape} escapes"] if dialect.escape else []
    parts += [dialect.encoding]
    return ", ".join(parts) + (f"{more and ', '}{more}" if header else ", no header")


def _newline(sample: bytes) -> str:
    """What ends the lines: "\\r" where it stands alone at the end of the first one, and more often than "\\n"."""
    first = re.search(rb"\r*\n|\r", sample)
    lone = sample.count(b"\r") - sample.count(b"\r\n")
    return "\r" if first and first[0] == b"\r" and lone > sample.count(b"\n") else "\n"


def _first_line(path: Path, dialect: Dialect) -> tuple[str, int]:
    """The first line that is not empty, and how many stand before it."""
    with open_bytes(path) as file:
        lines = Lines(file, dialect)
        for empty in range(_EMPTY):
            line = lines.take()
            if line is None:
                break
            if line.text.strip():
                return line.text, empty
    return "", 0


def _sample(path: Path, dialect: Dialect) -> Iterator[TableRow]:
    """The first rows of a table by a dialect, as far as they can be unpacked."""
    read = 0
    with open_bytes(path) as file, suppress(*PACKED):
        for row in islice(rows(Lines(file, dialect), dialect), dialect.skip, None):
            yield row
            read += len(row.raw)
            if read > _LOOK_AT:
                return


def _delimiter(path: Path, given: str, dialect: Dialect) -> str:
    """The given delimiter, with \\t for a tab, or the one that the first line shows (Excel writes semicolons where
    numbers have a decimal comma). UserError if it is not one character, or if the rows do not tell which of two it is.
    """
    if given:
        mark = "\t" if given == "\\t" else given
        if len(mark) != 1 or mark in '"\r\n':
            raise UserError(f"delimiter {given!r}: expected one character, or \\t for a tab")
        return mark
    found = {mark: _first_rows(path, replace(dialect, delimiter=mark)) for mark in MARKS}
    parting = [mark for mark in MARKS if found[mark] and len(found[mark][0]) > 1]
    by_name = "\t" if unpacked_name(path.name).endswith((".tsv", ".txt", ".tab")) else ","
    if not parting or (by_name == "\t" and by_name in parting):
        return by_name
    if len(parting) > 1:  # such as a comma in a caption: by the right one all rows have as many columns
        parting = [mark for mark in parting if len({len(row) for row in found[mark]}) == 1] or parting
    if len(parting) > 1:
        raise UserError(f"{path}: its columns may be parted by {' or '.join(map(repr, parting))}; say --delimiter")
    return parting[0]


def _first_rows(path: Path, dialect: Dialect) -> list[list[str]]:
    """The first rows by a delimiter, without broken ones."""
    found = islice(_sample(path, dialect), 1 + _EVEN_ROWS)
    return [row.values for row in found if row.values != [""] and not isinstance(row.values, str)]


def _tally(path: Path, dialect: Dialect) -> Counter[str]:
    """How many rows of the sample have quotes of which kind, if quotes count: `needed` ones (around a delimiter, a line
    end or a quote), others (`bare` inside a text, `around` a whole one), and `wrong` ones. `header`: whether the first
    row is in quotes."""
    found: Counter[str] = Counter()
    columns = 0
    for row in _sample(path, dialect):
        columns = columns or (len(row.values) if isinstance(row.values, list) else 0)
        if '"' in row.raw and (isinstance(row.values, list) or not _unreadable(row.values)):
            kind = _kind(row.values, row.raw, columns, dialect)
            found[kind] += 1
            if not found["rows"] and kind in ("around", "needed"):  # no name of a column has quotes of its own
                found["header"] += all(cell.startswith('"') for cell in content(row.raw).split(dialect.delimiter))
        found["rows"] += 1
    return found


def _unreadable(fault: str) -> bool:
    return fault.startswith(("not ", "line too long"))


def _kind(values: list[str] | str, raw: str, columns: int, dialect: Dialect) -> str:
    plain = content(raw)
    cells = plain.split(dialect.delimiter)
    if isinstance(values, str) or (len(values) != columns and len(cells) == columns):
        return "wrong"
    if values == cells:
        return "bare"
    inner = [cell[1:-1] for cell in cells if len(cell) > 1 and cell.startswith('"') and cell.endswith('"')]
    escaped = '""' in "".join(inner) or (dialect.escape and f'{dialect.escape}"' in "".join(inner))
    return "needed" if len(cells) != len(values) or "\n" in plain or escaped else "around"


def _with_quoting(path: Path, dialect: Dialect, said: Said) -> Dialect:
    """The dialect with the quoting that its rows show, and the escape of values in quotes."""
    _refuse_odd_quotes(path, dialect)
    found = _tally(path, dialect)
    if not said.escape and found["wrong"]:
        other = replace(dialect, escape="\\")
        escaping = _tally(path, other)
        if escaping["wrong"] < found["wrong"] and escaping["needed"]:
            dialect, found = other, escaping
    needed, around, bare, wrong = (found[kind] for kind in ("needed", "around", "bare", "wrong"))
    if not needed + around + wrong:  # quotes inside of texts read the same
        return _unused(path, dialect)
    if (found["header"] and said.header) or (needed and needed * 3 >= wrong):
        return replace(dialect, quoting="double")
    tabs, everywhere = dialect.delimiter == "\t", around * 10 > 9 * found["rows"] and not needed
    if everywhere and not tabs:
        return replace(dialect, quoting="double")
    if needed * 20 <= wrong and (wrong or tabs) and (tabs or around < wrong) and not everywhere:
        return replace(dialect, quoting="none", escape=dialect.escape if said.escape else "")
    if not tabs and not bare and not wrong:
        return dialect
    raise UserError(
        f"{path}: quotes around values may be the table's ({needed + around} rows) or a part of the texts "
        f"({bare + wrong} rows); say --quoting double or --quoting none"
    )


def _refuse_odd_quotes(path: Path, dialect: Dialect) -> None:
    """UserError if most values stand in single quotes, or in quotes behind a space: neither is read as quoting."""
    rows, single, spaced = 0, 0, 0
    for row in islice(_sample(path, dialect), 1, None):  # behind the header, which may have none
        cells = [cell for cell in content(row.raw).split(dialect.delimiter) if cell]
        rows += 1
        single += bool(cells) and cells[0].startswith("'") and cells[-1].endswith("'")
        spaced += any(re.fullmatch(r' +"[^"]*"', cell) for cell in cells[1:])
    if rows > 1 and (single * 10 > 8 * rows or spaced * 2 > rows):
        what = "single quotes" if single > spaced else "quotes behind a space"
        raise UserError(
            f"{path}: its values stand in {what}, which no option reads; rewrite it with plain quotes, or say "
            "--quoting none if they are a part of the texts"
        )


def _unused(path: Path, dialect: Dialect) -> Dialect:
    """The dialect of a sample in which no value is in quotes: a TSV has none, and a CSV has none where a backslash
    stands before delimiters, as csv.QUOTE_NONE writes it."""
    if dialect.delimiter == "\t":
        return replace(dialect, quoting="none")
    if dialect.escape:
        return dialect
    bare = replace(dialect, quoting="none")
    return replace(bare, escape="\\") if _counts(path, bare)["delimiter"] else dialect


def _bare_escape(path: Path, dialect: Dialect) -> str:
    """The escape of a table without quoting, "" if its backslashes are text."""
    found = _counts(path, dialect)
    if found["text"] or not (found["letter"] or found["delimiter"] or found["null"]):
        return ""
    if found["delimiter"] or found["null"]:
        return "\\"
    raise UserError(
        f"{path}: backslashes (\\n, \\t, \\\\; {found['letter']}) may be escapes, as MySQL and PostgreSQL write them, "
        "or a part of the texts; say --escape \\\\ or --escape none"
    )


def _counts(path: Path, dialect: Dialect) -> Counter[str]:
    """What stands after the backslashes of a sample: `delimiter` (or a line end) where the row has as many columns as
    the first only if it is escaped, `null` (a value that is \\N), a `letter` of MySQL's, or `text`."""
    found: Counter[str] = Counter()
    escaping = replace(dialect, escape="\\")
    columns = 0
    for row in _sample(path, escaping):
        values = row.values if isinstance(row.values, list) else []
        columns = columns or len(values)
        if "\\" in row.raw and len(values) == columns:
            cells = content(row.raw).split(dialect.delimiter)
            found["delimiter"] += len(cells) != columns or "\n" in content(row.raw)
            found["null"] += "\\N" in cells
            marks = re.findall(r"\\(.|\Z)", content(row.raw), re.DOTALL)
            letters = sum(mark in "\\ntr0bZNvf\"'\n\r" + dialect.delimiter and mark != "" for mark in marks)
            found["letter"] += letters
            found["text"] += len(marks) - letters
        elif "\\" in row.raw:
            found["text"] += 1
    return found
