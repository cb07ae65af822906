"""In which encoding a table is written: by its mark, by its bytes, or as the user says."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress
from pathlib import Path

from data_prep.errors import UserError
from data_prep.image_rule import ENCODINGS
from data_prep.sources.packed import PACKED, open_bytes
from data_prep.sources.table_rows import MARKS, is_wide

_SAMPLE = 2**20  # bytes by which it is found
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SHIFTS = re.compile(rb"\x1b(?:\$[@B]|\$\)C|\([JI])")  # between ASCII and Japanese or Korean
# Shown with a line of the file, where it is no UTF-8; none of them can be told from the others by rules.
_CANDIDATES = (
    *("cp1252", "cp1250", "cp1251", "koi8_u", "cp1253", "cp1254", "cp1256", "cp1257", "cp1258", "cp874"),
    *("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"),
)


def encoding_of(path: Path, sample: bytes, given: str) -> str:
    """The encoding that is `given`, or that the first bytes of a file show.

    Raises:
        UserError: there is none of that name, or the bytes do not tell.
    """
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
            if len(first) == 2 and "\0" not in text and any(mark in first[0] for mark in MARKS):
                return name
    if _SHIFTS.search(sample):
        raise UserError(
            f"{path}: switches between alphabets, as ISO-2022 does; say --encoding iso2022_jp, iso2022_kr or, if that "
            "is text, utf-8"
        )
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
    plain = "".join((*MARKS, '"\r\n'))
    try:
        if is_wide(given) or plain.encode("ascii").decode(given) == plain:
            return given
    except (LookupError, ValueError):  # of those that are no character sets ("hex"), or ask for another form
        pass
    raise UserError(f"--encoding {given}: cannot be read line by line; convert the file (`iconv -t UTF-8`)")


def head_of(path: Path) -> bytes:
    """The first bytes of a file, as far as they can be unpacked."""
    found = b""
    with open_bytes(path) as file, suppress(*PACKED):
        while len(found) < _SAMPLE and (more := file.read(2**13)):
            found += more
    return found[:_SAMPLE]
