"""TMX: translation memories, of OPUS or of a translator's tools. A unit is found by its bytes and parsed alone."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.languages import house_language
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.packed import PACKED, is_packed
from data_prep.sources.records import Dropped, Found, TextRecord, argument, option, showing
from data_prep.sources.tables import checked_file_stat, open_bytes
from data_prep.sources.texts import files_in

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_BYTES = 16 * 2**20  # of a piece
_LONGEST = 16 * 2**20  # bytes of a unit
_END = b"</tu>"
_BEGIN = re.compile(rb"<tu[\s>]")
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_ENCODING = re.compile(rb"<\?xml[^>]*?\bencoding\s*=\s*[\"']([\w.:-]+)")
_SOURCE = re.compile(rb"<header\b[^>]*?\bsrclang\s*=\s*[\"']([^\"']*)", re.DOTALL)
_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Tmx:
    """translation memories: .tmx files (also .gz), of OPUS or of a translator's tools

    A unit becomes a pair: its source language is the query. Formatting codes inside a segment (ph, bpt, ept, it) are
    left out, its text is kept as it is.
    """

    image: ClassVar[ImageRule | None] = None

    files: tuple[str, ...] = argument(".tmx or .tmx.gz files, or folders of them")
    languages: str = option("", "QUERY,TARGET (default: source language first, where a unit has two languages)")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")

    def pieces(self) -> Iterator[JsonObject]:
        if self.languages and (self.languages.count(",") != 1 or not all(self.languages.split(","))):
            raise UserError(f"--languages {self.languages}: expected QUERY,TARGET (de,en)")
        for path in files_in(self.files, (".tmx", ".tmx.gz")):
            piece: JsonObject = {"file": str(path), **checked_file_stat(path)}
            with open_bytes(path) as file:
                try:
                    head = file.read(2**16)
                except PACKED as error:
                    raise UserError(f"{path}: cannot be unpacked ({error}); expected gzip, whole") from error
            wide = head.startswith(_WIDE)
            text = head.decode("utf-16", "replace").encode() if wide else head
            if b"<tmx" not in text:
                raise UserError(f"{path}: is no TMX; expected <tmx …> near its beginning")
            source = _SOURCE.search(text)
            piece["source"] = source[1].decode("utf-8", "replace") if source else ""
            piece["encoding"] = "utf-8" if wide else _encoding(path, text)
            if wide or is_packed(path):
                yield {**piece, "start": 0, "end": None, "wide": wide}
                continue
            for start, end in _spans(path):
                yield {**piece, "start": start, "end": end, "wide": False}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        path = Path(piece["file"])
        wanted = [house_language(code) for code in self.languages.split(",")] if self.languages else []
        after = f" after byte {piece['start']}" if piece["start"] else ""
        number = 0
        with open_bytes(path) as file:
            if piece["start"]:
                file.seek(piece["start"])
            try:
                for number, unit in enumerate(_units(_blocks(file, piece)), 1):
                    where = f"{path.name}, unit {number}{after}"
                    yield from showing(unit, [self._pair(where, unit, wanted, piece)])
            except PACKED as error:
                where = f"{path.name}{after}, after unit {number} ({error})"
                yield Dropped("rest of a packed file that is cut short or damaged", where)

    def _pair(self, where: str, unit: bytes | None, wanted: list[str], piece: JsonObject) -> Found:
        if unit is None:
            return Dropped("unit that does not end", where)
        from xml.etree import ElementTree  # here: `--help` needs none of it

        try:
            texts = _texts(ElementTree.fromstring(_decoded(unit, piece["encoding"])))
        except (ElementTree.ParseError, ValueError) as error:
            return Dropped("unit that is not XML", f"{where} ({error})")
        if not wanted:
            if len(texts) != 2:
                return Dropped(
                    f"unit in {'one language' if len(texts) < 2 else 'several languages: say --languages'}", where
                )
            wanted = sorted(texts, key=lambda code: code != house_language(piece["source"]))
        if not all(code in texts for code in wanted):
            return Dropped("unit without both languages", where)
        query, target = ([Text(text, code, "body", self.origin) for text in texts[code]] for code in wanted)
        if not all(text.text.strip() for text in (*query, *target)):
            return Dropped("empty text", where)
        return TextRecord(where, query, target)


def _decoded(unit: bytes, stated: str) -> str:
    """UTF-8 wherever it is that: files often state another encoding than their tool wrote."""
    try:
        return unit.decode()
    except UnicodeDecodeError:
        return unit.decode(stated)


def _encoding(path: Path, head: bytes) -> str:
    """The encoding that an XML declaration states; UTF-8 where it says UTF-16 and the tags are ASCII all the same.

    Raises:
        UserError: one that is not known, or has no tags in ASCII.
    """
    stated = _ENCODING.search(head[:1000])
    name = stated[1].decode("ascii", "replace").lower() if stated else "utf-8"
    try:
        codec = codecs.lookup("utf-8" if re.match(r"utf-?(16|32)|ucs", name) else name).name
        if "<tu>".encode(codec) != b"<tu>":
            raise LookupError(name)
    except (LookupError, UnicodeError) as error:
        raise UserError(
            f"{path}: states the encoding {name!r}, which is not read here; expected UTF-8, UTF-16 with its mark, or "
            "one like ISO-8859-1"
        ) from error
    return codec


def _texts(unit: Element) -> dict[str, list[str]]:
    """Language → the segments of a unit, in its order."""
    found: dict[str, list[str]] = {}
    for variant in unit.iter("tuv"):
        code, segment = variant.get(_XML_LANG) or variant.get("lang") or "und", variant.find("seg")
        if segment is not None:
            found.setdefault(house_language(code), []).append(_plain(segment))
    return found


def _plain(element: Element) -> str:
    """The text of a segment; of what is inside, marked text (hi) counts, native codes do not."""
    parts = [element.text or ""]
    for inner in element:
        parts += [_plain(inner) if inner.tag == "hi" else "", inner.tail or ""]
    return "".join(parts)


def _spans(path: Path) -> Iterator[tuple[int, int]]:
    """Parts of a file, of some megabytes, that end after a unit."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            place, before = start + _BYTES, b""
            file.seek(place)
            while block := file.read(2**20):
                found = (before + block).find(_END)
                if found >= 0:
                    place += found - len(before) + len(_END)
                    break
                place, before = place + len(block), block[-len(_END) + 1 :]
            end = min(place, size) if block else size
            yield start, end
            start = end


def _blocks(file: IO[bytes], piece: JsonObject) -> Iterator[bytes]:
    """The bytes of a piece, as UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-16")(errors="replace") if piece["wide"] else None
    left = None if piece["end"] is None else piece["end"] - piece["start"]
    while left != 0 and (block := file.read(2**20 if left is None else min(2**20, left))):
        left = None if left is None else left - len(block)
        yield decoder.decode(block).encode() if decoder else block


def _units(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    """The units (<tu> … </tu>), without comments; None for one that does not end, which is the last."""
    held = b""
    for block in blocks:
        # The tag may lie across two blocks, so the last bytes held are looked at again.
        place = max(0, len(held) - len(_END))
        held += block
        begin = 0
        while (end := held.find(_END, max(place, begin))) >= 0:
            end += len(_END)
            unit = _COMMENT.sub(b"", held[begin:end])
            starts = _BEGIN.search(unit)
            if starts and b"<!--" not in unit:
                yield unit[starts.start() :]
            begin = end
        held = held[begin:]
        if len(held) > _LONGEST:
            break
    if _BEGIN.search(_COMMENT.sub(b"", held)):
        yield None
