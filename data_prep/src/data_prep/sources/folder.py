"""A folder of images and a table of captions, the usual form of private data."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.dialects import DELIMITER, ENCODING, ESCAPE, NO_HEADER, QUOTING, Said
from data_prep.sources.packed import unpacked_name
from data_prep.sources.records import (
    Dropped,
    Found,
    ImageRecord,
    Noted,
    argument,
    from_rows,
    option,
    pick,
    usual_column,
)
from data_prep.sources.row_columns import NEGATIVE_COLUMNS, usual_negatives
from data_prep.sources.tables import (
    check_columns,
    is_json_lines,
    line_pieces,
    noted,
    open_table,
    read_table,
    unknown,
)

_ROWS = 500
_IMAGE = ("image", "file", "file_name", "filename", "filepath", "path", "image_path")
_CAPTION = ("caption", "text", "captions", "sentence", "title")
_LONG = ("long_caption", "long", "description")
_LANGUAGE = ("language", "lang", "locale")


@dataclass(frozen=True)
class Folder:
    """a folder of images with a CSV, TSV or JSONL table of captions

    Columns are found by their usual names, or named by options. A row is a sample; a caption may be a list (JSONL) of
    alternatives. Images without a row are ignored.
    """

    image: ClassVar[ImageRule | None] = ImageRule()

    folder: str = argument("folder of the images; the table's file names start from here")
    table: str = option("", "CSV, TSV or JSONL file, also .gz (default: the only such file in FOLDER)")
    image_column: str = option("", f"column of the file name (default: the first of {', '.join(_IMAGE)})")
    caption_column: str = option("", f"column of the short caption (default: the first of {', '.join(_CAPTION)})")
    long_column: str = option("", f"column of the long caption (default: the first of {', '.join(_LONG)})")
    language_column: str = option("", f"column of the language (default: the first of {', '.join(_LANGUAGE)})")
    negative_columns: str = option("", NEGATIVE_COLUMNS)
    negatives: int = option(7, "negative images of a triplet; what has more is cut, what has fewer is a pair")
    language: str = option("und", "language where no column says it")
    origin: str = option("human", "where the captions came from: human, machine-translation, synthetic:MODEL")
    delimiter: str = option("", DELIMITER)
    quoting: str = option("", QUOTING, choices=("double", "none"))
    escape: str = option("", ESCAPE)
    encoding: str = option("", ENCODING)
    no_header: bool = option(False, NO_HEADER)
    held_out: float = option(0.0, "share of the images for OUT/validation, the rest going to OUT/train (default: none)")
    split: str = option("", "with --held-out: one of the two (default: both)", choices=("train", "validation"))

    def pieces(self) -> Iterator[JsonObject]:
        if not Path(self.folder).is_dir():
            raise UserError(f"{self.folder}: no such folder")
        table = Path(self.table) if self.table else _only_table(Path(self.folder))
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out:g}: expected a share of the images, such as 0.1")
        if self.negatives < 1:
            raise UserError(f"--negatives {self.negatives}: expected at least 1")
        if self.split and not self.held_out:
            raise UserError(f"--split {self.split}: of what? say the share of the other one, too: --held-out 0.1")
        if is_json_lines(table):
            yield from ({**piece, "format": "jsonl"} for piece in line_pieces(table))
            return
        opened = open_table(table, Said(self.delimiter, self.quoting, self.escape, self.encoding, not self.no_header))
        self._check(table, opened.columns)
        yield from opened.pieces(_ROWS)

    def _check(self, table: Path, columns: Sequence[str]) -> None:
        """UserError if a table lacks columns."""
        image = self.image_column or usual_column(columns, self._usual(_IMAGE))
        captions = [
            named or usual_column(columns, self._usual(usual))
            for named, usual in ((self.caption_column, _CAPTION), (self.long_column, _LONG))
        ]
        for found, what in (
            (image, "file names; name it: --image"),
            ("".join(captions), "captions; name it: --caption"),
        ):
            if not found:
                raise UserError(
                    f"{table}: {unknown(columns)} for {what}-column; if they are the first row, say --no-header"
                )
        language = self.language_column or usual_column(columns, self._usual(_LANGUAGE))
        check_columns(table, columns, filter(None, (image, *captions, language, *self._negative_columns(columns))))

    def _negative_columns(self, columns: Collection[str]) -> list[str]:
        return self.negative_columns.split(",") if self.negative_columns else usual_negatives(columns)

    def _usual(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The usual names of a column; without a header the places of file name and caption."""
        return names if not self.no_header else ("1",) if names is _IMAGE else ("2",) if names is _CAPTION else ()

    def read(self, piece: JsonObject) -> Iterator[Found]:
        yield from noted(piece)
        yield from from_rows(read_table(piece), self._record)

    def _record(self, where: str, values: JsonObject) -> Iterator[Found]:
        name = pick(values, self.image_column, self._usual(_IMAGE))
        if not isinstance(name, str) or not name:
            yield Dropped("no file name", where)
            return
        path = _file(self.folder, name)
        if path is None:
            yield Dropped("file name outside the folder", where)
            return
        if path != inside(Path(self.folder), name):
            yield Noted("images under another spelling of their name")
            name = os.path.relpath(path, self.folder)
        found = pick(values, self.language_column, self._usual(_LANGUAGE))
        language = found if isinstance(found, str) and found.strip() else self.language
        short = self._captions(pick(values, self.caption_column, self._usual(_CAPTION)), language, "name")
        long = self._captions(pick(values, self.long_column, self._usual(_LONG)), language, "long")
        if short is None or long is None:
            yield Dropped("caption is no text", where)
        elif not short and not long:
            yield Dropped("no caption", where)
        elif self.held_out and _side(path, self.held_out) != self.split:
            yield Dropped("of the other split", where)
        else:
            named = list(self._negatives(values))
            negatives = [negative for negative in named if isinstance(negative, Path)]
            for why in named:
                if isinstance(why, str):
                    yield Noted(f"negative images left out: {why}")
            left_out = len(negatives) < len(named)
            yield ImageRecord(where, os.path.normpath(name), path, short, long, negatives, self.negatives, left_out)

    def _negatives(self, values: JsonObject) -> Iterator[Path | str]:
        """The file of each negative image of a row, or why it is left out."""
        for column in self._negative_columns(values):
            value = pick(values, column, ())
            for name in value if isinstance(value, list) else [value]:
                path = _file(self.folder, name) if isinstance(name, str) and name else None
                if name is None or name == "":
                    continue
                if path is None:
                    yield "no file name, or one outside the folder"
                elif self.held_out and _side(path, self.held_out) != self.split:
                    yield "of the other split"
                else:
                    yield path

    def _captions(self, value: Any, language: str, role: str) -> list[Text] | None:
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            return None
        return [Text(text, language, role, self.origin) for text in texts if text.strip()]


def _side(path: Path, held_out: float) -> str:
    """The split of an image, by its bytes: one picture is in one split, whatever its rows and names.

    An unreadable file is assigned to train, so that its import reports it once.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return "train"
    return "validation" if int.from_bytes(digest[:8]) < held_out * 2**64 else "train"


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, or None if the name leads out of it.

    ".." is resolved before links; links inside the folder are followed. No file has a name with NUL, or with half a
    character.
    """
    root = os.path.abspath(folder)  # "." and ".." resolved, for the comparison of prefixes
    path = os.path.normpath(os.path.join(root, name))
    try:
        possible = "\0" not in name and os.fsencode(name) is not None
    except UnicodeEncodeError:
        possible = False
    return Path(path) if possible and path.startswith(os.path.join(root, "")) else None


def _file(folder: str, name: str) -> Path | None:
    """The file that a table means by a name, perhaps under another spelling; None if the name leads out of the
    folder."""
    path = inside(Path(folder), name)
    return path if path is None or os.path.isfile(path) else _spelt(Path(folder), name) or path


def _spelt(folder: Path, name: str) -> Path | None:
    """The file that a table may mean by a name under which there is none: with the slashes of Windows, the escapes of
    an address, accents in one piece or two (macOS), or an ending in other letters."""
    plain = name.strip().replace("\\", "/")
    for text in (plain, unquote(plain)):
        for form in ("NFC", "NFD"):
            stem, ending = os.path.splitext(unicodedata.normalize(form, text))
            for spelling in (stem + ending, stem + ending.lower(), stem + ending.upper()):
                path = inside(folder, spelling)
                if path is not None and os.path.isfile(path):
                    return path
    return None


def _only_table(folder: Path) -> Path:
    endings = (".csv", ".tsv", ".jsonl")
    found = sorted(
        path for path in folder.iterdir() if unpacked_name(path.name).endswith(endings) and not is_hidden(path.name)
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: expected one table of captions in it, found {names}; name it: --table")
    return found[0]
