"""A folder of images and a table of captions, the usual form of private data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, option, pick
from data_prep.sources.tables import is_json_lines, read_table, table_columns, table_pieces

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
    language: str = option("und", "language where no column says it")
    origin: str = option("human", "where the captions came from: human, machine-translation, synthetic:MODEL")
    delimiter: str = option("", "of the columns, one character or \\t (default: what parts the first line)")
    charset: str = option("utf-8", "character set of a CSV or TSV; Excel's plain CSV is often cp1252")
    held_out: float = option(0.0, "share of the images for OUT/validation, the rest going to OUT/train (default: none)")
    split: str = option("", "with --held-out: one of the two (default: both)", choices=("train", "validation"))

    def pieces(self) -> Iterator[JsonObject]:
        if not Path(self.folder).is_dir():
            raise UserError(f"{self.folder}: no such folder")
        table = Path(self.table) if self.table else _only_table(Path(self.folder))
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out:g}: expected a share of the images, such as 0.1")
        if self.split and not self.held_out:
            raise UserError(f"--split {self.split}: of what? say the share of the other one, too: --held-out 0.1")
        columns = None if is_json_lines(table) else table_columns(table, self.delimiter, self.charset)
        if columns is not None:
            for named in (self.image_column, self.caption_column, self.long_column, self.language_column):
                if named and named not in columns:
                    raise UserError(f"{table}: has no column {named!r}; it has {', '.join(columns)}")
            if not (self.image_column or set(_IMAGE) & set(columns)):
                raise UserError(
                    f"{table}: none of {', '.join(columns)} is known for file names; name it: --image-column"
                )
            if not (self.caption_column or self.long_column or set(_CAPTION + _LONG) & set(columns)):
                raise UserError(
                    f"{table}: none of {', '.join(columns)} is known for captions; name it: --caption-column"
                )
        yield from table_pieces(table, _ROWS, delimiter=self.delimiter, charset=self.charset)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_table(piece), self._record)

    def _record(self, where: str, values: JsonObject) -> Iterator[Found]:
        name = pick(values, self.image_column, _IMAGE)
        if not isinstance(name, str) or not name:
            yield Dropped("no file name", where)
            return
        path = inside(Path(self.folder), name)
        if path is None:
            yield Dropped("file name outside the folder", where)
            return
        found = pick(values, self.language_column, _LANGUAGE)
        language = found if isinstance(found, str) and found else self.language
        short = self._captions(pick(values, self.caption_column, _CAPTION), language, "name")
        long = self._captions(pick(values, self.long_column, _LONG), language, "long")
        if short is None or long is None:
            yield Dropped("caption is no text", where)
        elif not short and not long:
            yield Dropped("no caption", where)
        elif self.held_out and _side(path, self.held_out) != self.split:
            yield Dropped("of the other split", where)
        else:
            yield ImageRecord(where, os.path.normpath(name), path, short, long)

    def _captions(self, value: Any, language: str, role: str) -> list[Text] | None:
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            return None
        return [Text(text.strip(), language, role, self.origin) for text in texts if text.strip()]


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


def _only_table(folder: Path) -> Path:
    endings = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
    found = sorted(
        path for path in folder.iterdir() if path.name.lower().endswith(endings) and not is_hidden(path.name)
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: expected one table of captions in it, found {names}; name it: --table")
    return found[0]
