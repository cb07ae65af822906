"""Parallel files: the same line of two files is a translation (Moses; OPUS, also as its zip)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.languages import house_language
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.packed import PACKED, is_packed
from data_prep.sources.records import Dropped, Found, TextRecord, argument, option
from data_prep.sources.tables import checked_file_stat, open_bytes

_LINES = 20_000  # of a piece
_LONGEST = 2**20  # bytes of a line
_CODE = re.compile(r"(?!(txt|xml|ids|tok)$)[a-z]{2,3}([_-][A-Za-z]{2,4})?")
_PACKED = (*PACKED, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Moses:
    """parallel text of Moses or OPUS: two files with a sentence a line (also .gz), or a zip or folder of them

    Line n of one is the translation of line n of the other; files of different lengths are refused. The languages are
    the files' endings (corpus.de, corpus.en.gz).
    """

    image: ClassVar[ImageRule | None] = None

    files: tuple[str, ...] = argument("two files, or a zip of OPUS, or a folder with two")
    languages: str = option("", "QUERY,TARGET (default: the files' endings, in the order given)")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")

    def pieces(self) -> Iterator[JsonObject]:
        wanted = self.languages.split(",") if self.languages else []
        if self.languages and (len(wanted) != 2 or not all(wanted)):
            raise UserError(f"--languages {self.languages}: expected QUERY,TARGET (de,en)")
        archive, names = _two(self.files, wanted)
        languages = wanted or [_ending(name) for name in names]
        if not all(map(_CODE.fullmatch, languages)):
            raise UserError(f"{names[0]}, {names[1]}: do not end in languages; say --languages QUERY,TARGET")
        piece: JsonObject = {"file": archive or names[0], "names": names, "zip": bool(archive), "languages": languages}
        piece["stamps"] = [checked_file_stat(Path(name)) for name in ([archive] if archive else names)]
        if archive or any(is_packed(Path(name)) for name in names):
            yield {**piece, "starts": [0, 0], "lines": None, "line": 0}
            return
        (first, count), (second, other) = (_starts(Path(name)) for name in names)
        if count != other:
            raise UserError(
                f"{names[0]} has {count} lines, {names[1]} {other}: line by line they cannot be translations"
            )
        for number, starts in enumerate(zip(first, second, strict=True)):
            line = number * _LINES
            if line < count:
                yield {**piece, "starts": list(starts), "lines": min(_LINES, count - line), "line": line}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        import zipfile

        languages = [house_language(code) for code in piece["languages"]]
        name = Path(piece["file"]).name
        with ExitStack() as stack:
            files = [stack.enter_context(file) for file in _opened(piece)]
            lines = [_lines(file, piece["lines"]) for file in files]
            try:
                for number, pair in enumerate(zip_longest(*lines), piece["line"] + 1):
                    where = f"{name}, line {number}"
                    if pair[0] is None or pair[1] is None:
                        shorter = piece["names"][pair[1] is None]
                        raise UserError(f"{shorter}: has {number - 1} lines, the other file more: no translations")
                    yield _record(where, pair[0], pair[1], languages, self.origin)
            except (*_PACKED, zipfile.BadZipFile) as error:
                raise UserError(f"{piece['file']}: cannot be unpacked ({error}); expected it whole") from error


def _record(where: str, first: bytes, second: bytes, languages: list[str], origin: str) -> Found:
    if max(len(first), len(second)) > _LONGEST:
        return Dropped("line too long", where, content=first[:1000])
    try:
        query, target = first.decode("utf-8"), second.decode("utf-8")
    except UnicodeDecodeError:
        both = b" | ".join((first.strip(), second.strip()))
        return Dropped("not UTF-8", where, content=both)
    if not query.strip() or not target.strip():
        return Dropped("empty line", where, content=[query, target])
    return TextRecord(where, [Text(query, languages[0], "body", origin)], [Text(target, languages[1], "body", origin)])


def _two(given: tuple[str, ...], wanted: list[str]) -> tuple[str, list[str]]:
    """(the zip or "", the two files or members of it, in the order wanted or given)."""
    if len(given) == 2:
        return "", list(given)
    if len(given) != 1:
        raise UserError(f"{len(given)} files: expected two of aligned lines, or one zip or folder")
    path = Path(given[0])
    archive = ""
    if path.is_dir():
        names = [str(inner) for inner in sorted(path.iterdir()) if inner.is_file()]
    else:
        import zipfile

        archive = given[0]
        try:
            with zipfile.ZipFile(path) as file:
                names = sorted(file.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: expected two files, or a zip or folder of two ({error})") from error
    stems: dict[str, list[str]] = {}
    for name in names:
        if not is_hidden(name if archive else Path(name).name) and _CODE.fullmatch(_ending(name)):
            stems.setdefault(name.removesuffix(".gz").rpartition(".")[0], []).append(name)
    pairs = [found for found in stems.values() if len(found) > 1]
    if wanted:
        codes = [house_language(code) for code in wanted]
        pairs = [[name for code in codes for name in found if house_language(_ending(name)) == code] for found in pairs]
    if len(pairs) != 1 or len(pairs[0]) != 2:
        raise UserError(f"{path}: expected two files such as corpus.de and corpus.en, found {_listed(names)}")
    return archive, pairs[0]


def _listed(names: list[str]) -> str:
    shown = ", ".join(Path(name).name for name in names)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _ending(name: str) -> str:
    return name.removesuffix(".gz").rpartition(".")[2]


def _starts(path: Path) -> tuple[list[int], int]:
    """Where every `_LINES`-th line begins, and how many lines there are."""
    import numpy as np

    starts, count, place, last = [0], 0, 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(2**20):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            numbers = count + 1 + np.arange(len(ends))
            starts += (ends[numbers % _LINES == 0] + place + 1).tolist()
            count, place, last = count + len(ends), place + len(block), block[-1:]
    return starts, count + (last != b"\n")


def _opened(piece: JsonObject) -> Iterator[IO[bytes]]:
    if piece["zip"]:
        import zipfile

        for name in piece["names"]:
            yield zipfile.ZipFile(piece["file"]).open(name)  # noqa: SIM115 (the member keeps it open)
        return
    for name, start in zip(piece["names"], piece["starts"], strict=True):
        file = open_bytes(Path(name))
        if start:
            file.seek(start)
        yield file


def _lines(file: IO[bytes], limit: int | None) -> Iterator[bytes]:
    """Lines without their ends, each cut to one byte more than `_LONGEST`; `limit` of them, or all."""
    number = 0
    while number != limit and (line := file.readline(_LONGEST + 2)):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(2**20)
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        number += 1
        yield line.removesuffix(b"\n").removesuffix(b"\r")
