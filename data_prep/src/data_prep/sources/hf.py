"""Data sets of the Hugging Face kind: folders, files and names that the `datasets` library reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.arrow import read_arrow
from data_prep.sources.folder import inside
from data_prep.sources.hf_columns import Columns, caption_texts, find_columns, value_at
from data_prep.sources.hf_files import find_files
from data_prep.sources.hf_texts import TextRows
from data_prep.sources.parquet import image_bytes, read_parquet
from data_prep.sources.records import Dropped, Found, ImageRecord, Row, argument, objects, option
from data_prep.sources.tables import read_lines

_ROWS = 500


@dataclass(frozen=True)
class Hf:
    """a Hugging Face data set: a folder of save_to_disk, parquet files, or a name on the hub

    With an image column its rows are images with captions; else they are texts: `translation` structs, judged or scored
    passages (MS MARCO, Tevatron, FlagEmbedding, sentence-transformers), or the columns that `import texts` knows. Files
    of a hub are downloaded into the cache of the datasets library. No code of a data set is run.
    """

    image: ClassVar[ImageRule | None] = ImageRule()

    data: str = argument("folder, .parquet, .arrow or .jsonl file, or OWNER/NAME on the hub")
    config: str = option("", "configuration (subset), where there are several")
    split: str = option("train", "split to take")
    revision: str = option("", "commit, branch or tag of the hub (default: its newest)")
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
    negative_columns: str = option("", "columns of negatives, with commas")

    def pieces(self) -> Iterator[JsonObject]:
        self._texts()  # refuses options that contradict each other
        found = find_files(self.data, self.config, self.split, self.revision)
        names = {
            "image": self.image_column,
            "captions": self.caption_column,
            "long": self.long_column,
            "language": self.language_column,
        }
        columns = find_columns(self.data, found.features, names)
        for piece in found.pieces(_ROWS):
            yield {**piece, "columns": columns.plain()}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        columns, texts = Columns(**piece["columns"]), self._texts()
        for row in objects(_rows(piece, columns)):
            if isinstance(row, Dropped):
                yield row
            elif columns.image:
                yield self._captioned(*row, columns)
            else:
                yield from texts.records(row[0], columns.named_labels(row[1]))

    def _captioned(self, where: str, row: JsonObject, columns: Columns) -> Found:
        image = self._image(value_at(row, columns.image))
        if isinstance(image, str):
            return Dropped(image, where)
        said = value_at(row, columns.language) if columns.language else None
        language = said if isinstance(said, str) and said.strip() else self.language
        short: list[Text] = []
        for name in columns.captions:
            texts = caption_texts(value_at(row, name), language, "name", self.origin)
            if texts is None:
                return Dropped("caption is no text", where)
            short += texts
        long = caption_texts(value_at(row, columns.long) if columns.long else None, language, "long", self.origin)
        if long is None:
            return Dropped("caption is no text", where)
        if not short and not long:
            return Dropped("no caption", where)
        raw = image if isinstance(image, bytes) else str(image).encode()
        return ImageRecord(where, hashlib.sha256(raw).hexdigest()[:32], image, short, long)

    def _image(self, value: Any) -> bytes | Path | str:
        """The image's bytes, its file below the folder, or why there is none."""
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
        return inside(Path(self.data), name) or "image file outside the folder"

    def _texts(self) -> TextRows:
        return TextRows(
            self.language,
            self.language_column,
            self.origin,
            self.negatives,
            self.score_margin,
            (self.query_column, self.target_column, self.negative_columns),
        )


def _rows(piece: JsonObject, columns: Columns) -> Iterator[Row | Dropped]:
    if piece["format"] == "lines":
        return read_lines(piece)
    needed = columns.needed
    return read_parquet(piece, needed) if piece["format"] == "parquet" else read_arrow(piece, needed)
