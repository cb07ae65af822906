"""Which dialect a CSV or TSV file is written in: found from its bytes, or said by the user.

Spark, MySQL, Excel and Tatoeba write tables in ways that contradict each other. Where the bytes do not tell how a text
is meant, the user is asked: no text is changed by a guess.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data_prep.errors import UserError
from data_prep.image_rule import ENCODINGS
from data_prep.sources.table_rows import PACKED, Dialect, Lines, TableRow, is_wide, open_bytes, rows

_MARKS = (",", ";", "\t", "|")  # delimiters that are tried if none is given
_EVEN_ROWS = 20  # rows that decide if the first line allows several delimiters
_SAMPLE = 2**20  # bytes by which the encoding is found
_LOOK_AT = 4 * 2**20  # characters by which quoting is found
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What the options of importers say of it.
DELIMITER = "of a table's columns, one character or \\t (default: what parts the first line)"
QUOTING = "double: values may stand in quotes; none: quotes are text (default: as the rows show)"
ESCAPE = "character that stands before quotes and delimiters in a text, or none (default: as the rows show)"
ENCODING = "of a table, such as utf-16 or cp1252, Excel's (default: by its bytes)"
NO_HEADER = "the first line of a table is a row; its columns are called 1, 2, …"
# Shown with a line of the file, where it is no UTF-8; none of them can be told from the others by rules.
_CANDIDATES = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1256", "gb18030", "big5", "shift_jis", "euc_kr")


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
    sample = _head(path)
    encoding = _encoding(path, sample, said.encoding)
    newline = "\n" if is_wide(encoding) or b"\n" in sample or b"\r" not in sample else "\r"
    escape = "" if said.escape == "none" else "\\" if said.escape == "\\\\" else said.escape
    if len(escape) > 1 or escape in ('"', "\r", "\n", "\t"):
        raise UserError(f"--escape {said.escape!r}: expected one character, such as \\, or none")
    base = Dialect(",", said.quoting or "double", escape, encoding, newline)
    first = _first_line(path, base)
    hint = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's own
    base = replace(base, skip=1 if hint else 0)
    base = replace(base, delimiter=_delimiter(path, said.delimiter or (hint[1] if hint else ""), base))
    if not said.quoting:
        base = _with_quoting(path, base, said)
    if not said.escape and base.quoting == "none":
        base = replace(base, escape=_bare_escape(path, base))
    return base


def described(dialect: Dialect, *, header: bool) -> str:
    """For the receipt: "comma, quotes, utf-8"."""
    parts = [_NAMES.get(dialect.delimiter, repr(dialect.delimiter))]
    parts += ["quotes are text" if dialect.quoting == "none" else "values may be quoted"]
    parts += [f"{dialect.escape} escapes"] if dialect.escape else []
    parts += [dialect.encoding]
    return ", ".join(parts) + ("" if header else ", no header")


def _encoding(path: Path, sample: bytes, given: str) -> str:
    if given:
        return _known_encoding(given)
    marked = next((name for mark, name in _BOMS if sample.startswith(mark)), None)
    if marked:
        return marked
    if b"\0" in sample:
        for name, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
            try:
                text = sample[: len(sample) // width * width].decode(name)
            except UnicodeDecodeError:
                continue
            first = re.split("[\r\n]", text, maxsplit=1)
            if len(first) == 2 and "\0" not in text and any(mark in first[0] for mark in _MARKS):
                return name
    lines = sample.splitlines()[: -1 if len(sample) == _SAMPLE else None]
    high = [line for line in lines if not line.isascii()]
    wrong = [line for line in high if not _decodes(line, "utf-8")]
    # A value here and there costs its row; if it is what the file is written in, the user is asked.
    if (lines and lines[0] in wrong) or len(wrong) > max(1, len(lines) // 100, len(high) - len(wrong)):
        shown = [
            f"{name} {_around(wrong[0].decode(name))!r}" for name in _CANDIDATES if _decodes(b"\n".join(wrong), name)
        ]
        raise UserError(
            f"{path}: is not UTF-8, and its bytes do not tell what else; say --encoding with the name under which this "
            f"line reads right: {', '.join(shown) or ascii(wrong[0][:60])}"
        )
    return "utf-8"


def _around(line: str) -> str:
    """A few words around the first letter that is no ASCII."""
    place = next(number for number, sign in enumerate(line) if not sign.isascii())
    return line[max(0, place - 12) : place + 12].strip()


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _known_encoding(given: str) -> str:
    """UserError for one that Python does not know, or whose line ends and marks are neither those of ASCII nor wide:
    rows are found by them."""
    if given in ENCODINGS:
        raise UserError(f"--encoding {given}: this is the table's; that of images is --image-encoding {given}")
    try:
        codecs.lookup(given)
    except LookupError as error:
        raise UserError(f"--encoding {given}: no such encoding; utf-8, utf-16 and cp1252 are the usual ones") from error
    plain = "".join((*_MARKS, '"\r\n'))
    try:
        if is_wide(given) or plain.encode("ascii").decode(given) == plain:
            return given
    except (LookupError, ValueError):  # of those that are no character sets ("hex"), or ask for another form
        pass
    raise UserError(f"--encoding {given}: cannot be read line by line; convert the file (`iconv -t UTF-8`)")


def _head(path: Path) -> bytes:
    """The first bytes of a file, as far as they can be unpacked."""
    found = b""
    with open_bytes(path) as file, suppress(*PACKED):
        while len(found) < _SAMPLE and (more := file.read(2**13)):
            found += more
    return found[:_SAMPLE]


def _first_line(path: Path, dialect: Dialect) -> str:
    with open_bytes(path) as file:
        line = Lines(file, dialect).take()
    return line.text if line else ""


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
    found = {mark: _first_rows(path, replace(dialect, delimiter=mark)) for mark in _MARKS}
    parting = [mark for mark in _MARKS if found[mark] and len(found[mark][0]) > 1]
    by_name = "\t" if path.name.lower().removesuffix(".gz").endswith((".tsv", ".txt")) else ","
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
                found["header"] += all(cell.startswith('"') for cell in _plain(row.raw).split(dialect.delimiter))
        found["rows"] += 1
    return found


def _unreadable(fault: str) -> bool:
    return fault.startswith(("not ", "line too long"))


def _plain(raw: str) -> str:
    return raw.removesuffix("\n").removesuffix("\r")


def _kind(values: list[str] | str, raw: str, columns: int, dialect: Dialect) -> str:
    plain = _plain(raw)
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
    if needed * 20 <= wrong and (wrong or tabs) and not everywhere:
        return replace(dialect, quoting="none", escape=dialect.escape if said.escape else "")
    if not tabs and not bare and not wrong:
        return dialect
    raise UserError(
        f"{path}: quotes around values may be the table's ({needed + around} rows) or a part of the texts "
        f"({bare + wrong} rows); say --quoting double or --quoting none"
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
            cells = _plain(row.raw).split(dialect.delimiter)
            found["delimiter"] += len(cells) != columns or "\n" in _plain(row.raw)
            found["null"] += "\\N" in cells
            marks = re.findall(r"\\(.|\Z)", _plain(row.raw), re.DOTALL)
            letters = sum(mark in "\\ntr0bZNvf\"'\n\r" + dialect.delimiter and mark != "" for mark in marks)
            found["letter"] += letters
            found["text"] += len(marks) - letters
        elif "\\" in row.raw:
            found["text"] += 1
    return found
