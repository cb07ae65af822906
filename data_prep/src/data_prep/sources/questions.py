"""Sets of questions about documents and figures: DocVQA, InfographicsVQA, ArXivQA, SciGraphQA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_prep.image_rule import ImageRule
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.answers import answer_text, by_image, chosen, question_caption
from data_prep.sources.folder import inside
from data_prep.sources.json_lists import list_pieces, read_list
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, option
from data_prep.sources.tables import line_pieces, read_lines

DOCUMENTS = ImageRule(768, kernel="bicubic")
_ELEMENTS = 2000


@dataclass(frozen=True)
class DocVqa:
    """DocVQA: its JSON of questions and the folder of page images

    Questions about one page are captions of one sample. Of several spellings of an answer the first counts.
    """

    image: ClassVar[ImageRule | None] = DOCUMENTS
    image_field: ClassVar[str] = "image"

    questions: str = argument("the set's JSON (data: [{questionId, question, image, answers, …}])")
    images: str = argument("folder from which the image names start")

    def pieces(self) -> Iterator[JsonObject]:
        yield from list_pieces(self.questions, _ELEMENTS, key="data")

    def read(self, piece: JsonObject) -> Iterator[Found]:
        yield from by_image(read_list(piece), self._question, Path(self.images))

    def _question(self, where: str, fields: JsonObject) -> tuple[object, Text | Dropped]:
        answers = fields.get("answers")
        answer = answer_text(answers[0]) if isinstance(answers, list) and answers else answer_text(answers)
        caption = question_caption(fields.get("question"), answer, where=where, origin="human:joined")
        return fields.get(self.image_field), caption


@dataclass(frozen=True)
class InfographicsVqa(DocVqa):
    """InfographicsVQA: its JSON of questions and the folder of images

    As DocVQA; the image is named by image_local_name.
    """

    image_field: ClassVar[str] = "image_local_name"


@dataclass(frozen=True)
class ArxivQa:
    """ArXivQA: its JSON lines and the folder of figures

    The answer is the text of the option that the label names.
    """

    image: ClassVar[ImageRule | None] = DOCUMENTS

    questions: str = argument("arxivqa.jsonl ({id, image, question, options, label, rationale} a line)")
    images: str = argument("folder from which the image names start")
    origin: str = option("synthetic:gpt-4v", "where questions and answers came from")

    def pieces(self) -> Iterator[JsonObject]:
        yield from line_pieces(self.questions)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        yield from by_image(read_lines(piece), self._question, Path(self.images))

    def _question(self, where: str, fields: JsonObject) -> tuple[object, Text | Dropped]:
        answer = answer_text(chosen(fields.get("label"), fields.get("options")))
        caption = question_caption(fields.get("question"), answer, where=where, origin=self.origin)
        return fields.get("image"), caption


@dataclass(frozen=True)
class SciGraphQa:
    """SciGraphQA: its JSON (or JSON lines) and the folder of figures

    The figure's own caption is the short one; each question with its answer is a long one.
    """

    image: ClassVar[ImageRule | None] = DOCUMENTS

    questions: str = argument("the set's .json or .jsonl ({image_file, id, caption, q_a_pairs, …})")
    images: str = argument("folder from which the image names start")
    origin: str = option("synthetic:palm-2", "where questions and answers came from")

    def pieces(self) -> Iterator[JsonObject]:
        if self.questions.endswith(".json"):
            yield from ({**piece, "list": True} for piece in list_pieces(self.questions, _ELEMENTS))
        else:
            yield from line_pieces(self.questions)

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_list(piece) if piece.get("list") else read_lines(piece), self._record)

    def _record(self, where: str, fields: JsonObject) -> Iterator[Found]:
        name, caption, pairs = (fields.get(field) for field in ("image_file", "caption", "q_a_pairs"))
        path = inside(Path(self.images), name) if isinstance(name, str) and name else None
        if path is None:
            yield Dropped("no image name, or one outside the folder", where)
            return
        short = [Text(caption.strip(), "en", "name")] if isinstance(caption, str) and caption.strip() else []
        long: list[Text] = []
        for pair in pairs if isinstance(pairs, list) else []:
            question, answer = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
            found = question_caption(question, answer_text(answer), where=where, origin=self.origin)
            if isinstance(found, Text):
                long.append(found)
        if short or long:
            yield ImageRecord(where, str(name), path, short, list(dict.fromkeys(long)))
        else:
            yield Dropped("no caption", where)
