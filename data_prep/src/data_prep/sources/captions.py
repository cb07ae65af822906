"""Sets of captioned images: ShareGPT4V, COCO and Flickr with Karpathy's splits, ArXivCap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.folder import inside
from data_prep.sources.json_lists import list_pieces, read_list
from data_prep.sources.parquet import image_bytes, parquet_pieces, read_parquet
from data_prep.sources.questions import DOCUMENTS
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, option
from data_prep.sources.texts import files_in, names_of

_ELEMENTS = 1000


@dataclass(frozen=True)
class ShareGpt4v:
    """ShareGPT4V: its JSON and the folder of images

    The first answer of a conversation is the long caption. Conversations without an image are left out.
    """

    image: ClassVar[ImageRule | None] = ImageRule(512)

    conversations: str = argument("the set's JSON ([{id, image, conversations}])")
    images: str = argument("folder from which the image names start")
    origin: str = option("synthetic:sharegpt4v", "where the captions came from")

    def pieces(self) -> Iterator[JsonObject]:
        return list_pieces(self.conversations, _ELEMENTS)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_list(piece), self._record)

    def _record(self, where: str, fields: JsonObject) -> Iterator[Found]:
        name, turns = fields.get("image"), fields.get("conversations")
        if not isinstance(name, str) or not name:
            yield Dropped("conversation without an image", where)
            return
        path = inside(Path(self.images), name)
        answers = [
            turn["value"].strip()
            for turn in (turns if isinstance(turns, list) else [])
            if isinstance(turn, dict) and turn.get("from") == "gpt" and isinstance(turn.get("value"), str)
        ]
        if path is None:
            yield Dropped("file name outside the folder", where)
        elif not answers or not answers[0]:
            yield Dropped("no caption", where)
        else:
            yield ImageRecord(where, name, path, long=[Text(answers[0], "en", "long", self.origin)])


@dataclass(frozen=True)
class Karpathy:
    """COCO or Flickr with Karpathy's splits: dataset_coco.json or dataset_flickr30k.json and the images

    The sentences are alternative short captions. Leave test and val out of training.
    """

    image: ClassVar[ImageRule | None] = ImageRule()

    dataset: str = argument("dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json")
    images: str = argument("folder of the images (COCO: the one that holds train2014 and val2014)")
    splits: str = option("train,restval", "splits to take, with commas")

    def pieces(self) -> Iterator[JsonObject]:
        return list_pieces(self.dataset, _ELEMENTS, key="images")

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_list(piece), self._record)

    def _record(self, where: str, fields: JsonObject) -> Iterator[Found]:
        splits = self.splits.split(",")
        if fields.get("split") not in splits:
            yield Dropped("of another split", where)
            return
        folder, name, sentences = fields.get("filepath", ""), fields.get("filename"), fields.get("sentences")
        path = None
        if isinstance(name, str) and isinstance(folder, str):
            path = inside(Path(self.images), f"{folder}/{name}" if folder else name)
        captions = [
            Text(sentence["raw"].strip(), "en", "name")
            for sentence in (sentences if isinstance(sentences, list) else [])
            if isinstance(sentence, dict) and isinstance(sentence.get("raw"), str) and sentence["raw"].strip()
        ]
        if path is None:
            yield Dropped("no image name, or one outside the folder", where)
        elif not captions:
            yield Dropped("no caption", where)
        else:
            yield ImageRecord(where, str(fields.get("cocoid") or name), path, captions)


@dataclass(frozen=True)
class ArxivCap:
    """ArXivCap: its parquet files

    A figure is a sample; the short caption is its own part's caption, or the whole figure's, and where it has both they
    are joined.
    """

    image: ClassVar[ImageRule | None] = DOCUMENTS

    files: tuple[str, ...] = argument("parquet files, or folders of them")

    def pieces(self) -> Iterator[JsonObject]:
        paths = files_in(self.files, (".parquet",))
        for path, name in zip(paths, names_of(paths), strict=True):  # a figure's identity begins with its file's name
            for piece in parquet_pieces([path], 100, columns=("caption_images",)):
                yield {**piece, "shown": name}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_parquet(piece, ("caption_images",)), self._record)

    def _record(self, paper: str, fields: JsonObject) -> Iterator[Found]:
        figures = fields.get("caption_images") or []
        if not isinstance(figures, list):  # a parquet column may have any type
            yield Dropped("no list of figures", paper)
            return
        for figure_number, figure in enumerate(figures, 1):
            parts = figure.get("cil_pairs") if isinstance(figure, dict) else None
            if not isinstance(parts, list):
                yield Dropped("figure without parts", f"{paper}, figure {figure_number}")
                continue
            for part_number, part in enumerate(parts, 1):
                where = f"{paper}, figure {figure_number}, part {part_number}"
                part = part if isinstance(part, dict) else {}
                image = image_bytes(part.get("image"))
                own = [figure.get("caption"), part.get("sub_caption")]
                texts = [text.strip() for text in own if isinstance(text, str) and text.strip()]
                if image is None:
                    yield Dropped("no image", where)
                elif not texts:
                    yield Dropped("no caption", where)
                else:
                    origin = "human" if len(texts) == 1 else "human:joined"
                    yield ImageRecord(where, where, image, [Text(" ".join(texts), "en", "name", origin)])
