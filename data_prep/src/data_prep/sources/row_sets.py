"""Rows with columns of any names, images with captions or texts: what data sets of Hugging Face and MosaicML are."""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.shards.format import JsonObject
from data_prep.sources.folder import inside
from data_prep.sources.labels import COLUMN, GRADED, LEAST, NO_MATCH, POSITIVES, SCALE
from data_prep.sources.no_match import hard_negatives, left_for_later
from data_prep.sources.parquet import image_bytes
from data_prep.sources.records import Dropped, Found, ImageRecord, NoMatch, Noted, Row, argument, option, showing
from data_prep.sources.row_columns import Columns, Kinds, caption_texts, find_columns, value_at
from data_prep.sources.text_rows import TextRows
from data_prep.sources.texts import NO_FORM, Texts

if TYPE_CHECKING:
    from zipfile import ZipFile

_LOOK_AT = 100  # rows of a file
_MAX_BYTES = 256 * 2**20  # of an image in a zip


@dataclass(frozen=True)
class RowSet(ABC):
    """Base class: what the columns mean is common, where the rows are is a source's own."""

    image: ClassVar[ImageRule | None] = ImageRule()

    data: str = argument("folder")
    image_column: str = option("", "column of the image (default: the one of type Image)")
    caption_column: str = option("", "columns of short captions, with commas; a.b is b in a (default: by usual names)")
    long_column: str = option("", "column of the long caption")
    language_column: str = option("", "column of the language (default: language, lang, locale)")
    language: str = option("und", "language where no column says it; QUERY,TARGET for text pairs across languages")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")
    negatives: int = option(7, "negatives of a triplet; what has more is cut")
    score_margin: float = option(0.0, "leave out negatives that a teacher scores less than this below the positive")
    query_column: str = option("", "column of the query")
    target_column: str = option("", "column of the target")
    negative_columns: str = option("", "columns of negatives, texts or images, with commas (default: by usual names)")
    label_column: str = option("", COLUMN)
    positives: str = option("", POSITIVES)
    no_match: str = option("", NO_MATCH)
    score_scale: float = option(1.0, SCALE)
    min_score: float = option(0.8, LEAST)
    graded: str = option("pairs", GRADED, choices=("pairs", "sts"))

    @abstractmethod
    def found(self) -> tuple[Kinds | None, Iterator[JsonObject]]:
        """What the columns hold (None if only the rows tell), and the units of work."""

    @abstractmethod
    def rows(self, piece: JsonObject, columns: Sequence[str]) -> Iterator[Row | Dropped]:
        """The rows of a unit, with those of `columns` that they have."""

    def pieces(self) -> Iterator[JsonObject]:
        self._texts()  # refuses options that contradict each other
        kinds, pieces = self.found()
        names = {
            "image": self.image_column,
            "captions": self.caption_column,
            "long": self.long_column,
            "language": self.language_column,
            "negatives": self.negative_columns,
        }
        columns = find_columns(self.data, kinds, names)
        file, labelled, again = "", False, list[JsonObject]()
        for piece in pieces:
            whole = {**piece, "columns": columns.plain()}
            if piece["file"] != file and not columns.image:  # labels that cannot be read are refused before it begins
                labelled = self._texts().labelled(self._rows(whole, columns))
                if kinds is not None and not file:
                    self._check_form(self._rows(whole, columns))
            file = piece["file"]
            again += [whole] * labelled
            yield {**whole, "gathered": labelled}
        if again:
            yield {"file": self.data, "no_match": again}

    def _check_form(self, rows: Iterator[Row | Dropped]) -> None:
        """UserError if no column is known: none of the first rows has a form, though one has all values."""
        first = [row for row in islice(rows, _LOOK_AT) if not isinstance(row, Dropped) and isinstance(row[1], dict)]
        found = [one for row in first for one in self._texts().records(*row)]
        strange = all(isinstance(one, Dropped) and one.reason == NO_FORM for one in found)
        whole = next((row for row in first if None not in row[1].values()), None)
        if strange and whole is not None:
            raise UserError(
                f"{whole[0]}: none of its columns ({', '.join(whole[1])}) is known for texts, or holds images; name "
                "them: --query-column and --target-column, or --image-column and --caption-column"
            )

    def read(self, piece: JsonObject) -> Iterator[Found]:
        if "no_match" in piece:
            rows = ((one.get("file", self.data), found) for one in piece["no_match"] for found in self._found(one))
            yield from hard_negatives(rows, self.negatives)
        else:
            yield from left_for_later(self._found(piece), gathered=piece["gathered"])

    def _found(self, piece: JsonObject) -> Iterator[Found | NoMatch]:
        columns, texts = Columns(**piece["columns"]), self._texts()
        for row in self._rows(piece, columns):
            if isinstance(row, Dropped):
                yield row
            elif columns.image:
                yield from showing(row[1], self._captioned(*row, columns, [self.data, *piece.get("roots", ())]))
            else:
                yield from showing(row[1], texts.records(*row))

    def _rows(self, piece: JsonObject, columns: Columns) -> Iterator[Row | Dropped]:
        """The rows of a unit, with names for the numbers of classes."""
        for row in self.rows(piece, columns.needed):
            if isinstance(row, Dropped) or not isinstance(row[1], dict):  # a list, as `import texts` knows it
                yield row
            else:
                yield row[0], columns.named_labels(_with_texts(row[1], columns.image))

    def _captioned(self, where: str, row: JsonObject, columns: Columns, roots: list[str]) -> Iterator[Found]:
        image = self._image(value_at(row, columns.image), roots)
        if isinstance(image, str):
            yield Dropped(image, where)
            return
        said = value_at(row, columns.language) if columns.language else None
        language = said if isinstance(said, str) and said.strip() else self.language
        of_short = [caption_texts(value_at(row, name), language, "name", self.origin) for name in columns.captions]
        long = caption_texts(value_at(row, columns.long) if columns.long else None, language, "long", self.origin)
        if long is None or None in of_short:
            yield Dropped("caption is no text", where)
            return
        short = [text for texts in of_short for text in texts or ()]
        if not short and not long:
            yield Dropped("no caption", where)
            return
        negatives = list[bytes | Path]()
        for value in _in_columns(row, columns.negatives):
            negative = self._image(value, roots)
            if isinstance(negative, str):
                yield Noted(f"negative images left out: {negative}")
            else:
                negatives.append(negative)
        raw = image if isinstance(image, bytes) else str(image).encode()
        item = hashlib.sha256(raw).hexdigest()[:32]
        yield ImageRecord(where, item, image, short, long, negatives, self.negatives)

    def _image(self, value: Any, roots: list[str]) -> bytes | Path | str:
        """The image's bytes, its file below one of the folders, or why there is none."""
        if isinstance(value, list):
            if len(value) != 1:
                return "several images in a row" if value else "no image"
            value = value[0]
        data = image_bytes(value)
        if data is not None:
            return data
        name = value.get("path") if isinstance(value, dict) else None
        if not isinstance(name, str) or not name:
            return "no image"
        member, _, archive = name.removeprefix("zip://").rpartition("::")  # "zip://a.jpg::/photos/train.zip"
        found = next(filter(None, (inside(Path(root), archive) for root in roots)), None)
        if found is None:
            return "image file outside the folder"
        return _in_zip(found, member) if member else found

    def _texts(self) -> TextRows:
        shared = {field.name for field in fields(Texts)} & {field.name for field in fields(self)}
        return TextRows(
            Texts((), **{name: getattr(self, name) for name in shared}), self.language_column, self.score_margin
        )


def _in_columns(row: JsonObject, columns: Sequence[str]) -> Iterator[Any]:
    """The values of columns, those of a list one by one, without those that are not there."""
    for name in columns:
        value = value_at(row, name)
        yield from (each for each in (value if isinstance(value, list) else [value]) if each is not None)


def _with_texts(row: JsonObject, image: str) -> JsonObject:
    """The row, with text in place of bytes that are UTF-8: not all writers mark it. Not those of its image."""
    image = image if image in row else image.partition(".")[0]
    return {name: value if name == image else _text(value) for name, value in row.items()}


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return list(map(_text, value)) if isinstance(value, list) else value


@lru_cache(maxsize=4)
def _opened(path: Path) -> ZipFile:
    """A zip, kept open: its list of files is read once."""
    import zipfile

    return zipfile.ZipFile(path)


def _in_zip(path: Path, member: str) -> bytes | str:
    """The bytes of a file in a zip, or why there are none."""
    import zipfile

    try:
        if _opened(path).getinfo(member).file_size > _MAX_BYTES:
            return "image file too large"
        return _opened(path).read(member)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return "image file in a zip cannot be read"
