"""ViDoRe: the training set, and its benchmarks in BEIR's format (corpus, queries, qrels)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.answers import answer_text, chosen, listed, question_caption
from data_prep.sources.parquet import image_bytes, parquet_pieces, read_parquet
from data_prep.sources.questions import DOCUMENTS
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, option
from data_prep.sources.texts import files_in

_COLUMNS = ("query", "image", "image_filename", "options", "answer", "page", "model", "prompt", "source")
_TEXTS = tuple(name for name in _COLUMNS if name != "image")
_ROWS = 500


@dataclass(frozen=True)
class Vidore:
    """ViDoRe's training set: its parquet files

    The caption is query and answer; a letter stands for the option that it names. Queries that a model wrote carry its
    name as their origin.
    """

    image: ClassVar[ImageRule | None] = DOCUMENTS

    files: tuple[str, ...] = argument("parquet files, or folders of them")
    language: str = option("en", "language of the queries")

    def pieces(self) -> Iterator[JsonObject]:
        yield from parquet_pieces(files_in(self.files, (".parquet",)), _ROWS, columns=("query", "image"))

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_parquet(piece, _COLUMNS, texts=_TEXTS), self._record)

    def _record(self, where: str, fields: JsonObject) -> Iterator[Found]:
        image, query = image_bytes(fields.get("image")), fields.get("query")
        if image is None:
            yield Dropped("no image", where)
            return
        if not isinstance(query, str) or not query.strip():
            yield Dropped("no question", where)
            return
        answer = answer_text(chosen(listed(fields.get("answer")), listed(fields.get("options"))))
        model = fields.get("model")
        origin = f"synthetic:{model}" if isinstance(model, str) and model else "human:joined"
        caption = (
            question_caption(query, answer, where=where, origin=origin, language=self.language)
            if answer
            else Text(query.strip(), self.language, "long", origin)  # many synthetic queries have no answer
        )
        assert isinstance(caption, Text)
        item = str(fields.get("image_filename") or where)
        if fields.get("page") not in (None, ""):
            item += f"/{fields['page']}"
        yield ImageRecord(where, item, image, long=[caption])


@dataclass(frozen=True)
class VidoreBenchmark:
    """a ViDoRe benchmark in BEIR's form: corpus, queries and qrels as parquet

    A page is a sample; the queries for which it is relevant are its captions. A page without queries stays as a
    candidate, with its number as a text of the role "key", which is not evaluated.
    """

    image: ClassVar[ImageRule | None] = ImageRule(1024, kernel="bicubic")

    folder: str = argument("folder with parquet files of corpus, queries and qrels, by folder or file name")
    language: str = option("en", "language of the queries, where they do not say it")

    def pieces(self) -> Iterator[JsonObject]:
        _parts(self.folder, "qrels")
        _parts(self.folder, "queries")
        yield from parquet_pieces(_parts(self.folder, "corpus"), _ROWS, columns=("corpus-id", "image"))

    def read(self, piece: JsonObject) -> Iterator[Found]:
        return from_rows(read_parquet(piece, ("corpus-id", "image"), texts=("corpus-id",)), self._record)

    def _record(self, where: str, fields: JsonObject) -> Iterator[Found]:
        relevant = _relevant(self.folder, self.language)
        number, image = fields.get("corpus-id"), image_bytes(fields.get("image"))
        if number is None or image is None:
            yield Dropped("no image" if image is None else "no corpus-id", where)
            return
        captions = relevant.get(str(number)) or [Text(str(number), "und", "key")]
        yield ImageRecord(where, str(number), image, short=captions)


def _parts(folder: str, part: str) -> list[Path]:
    """The parquet files of a part: corpus/*.parquet, data/corpus-….parquet, corpus.parquet."""
    root = Path(folder)
    found = sorted(
        path
        for path in root.rglob("*.parquet")
        if any(piece.startswith(part) for piece in path.relative_to(root).parts)
        and not is_hidden(str(path.relative_to(root)))
    )
    if not found:
        raise UserError(f"{folder}: holds no {part}*.parquet and no folder {part}/ of parquet files")
    return found


@cache
def _relevant(folder: str, language: str) -> dict[str, list[Text]]:
    """Page → the queries that it answers."""
    queries: dict[str, Text] = {}
    for fields in _all(folder, "queries", ("query-id", "query", "language")):
        text, own = fields["query"], fields.get("language")
        if isinstance(text, str) and text.strip():
            code = own if isinstance(own, str) and len(own) == 2 else language
            queries[str(fields["query-id"])] = Text(text.strip(), code, "query")
    relevant: dict[str, list[Text]] = {}
    for fields in _all(folder, "qrels", ("query-id", "corpus-id", "score")):
        query = queries.get(str(fields["query-id"]))
        score = fields.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise UserError(f"{folder}: qrels hold the score {score!r}; expected numbers, above 0 for what is relevant")
        if query is not None and score > 0:
            relevant.setdefault(str(fields["corpus-id"]), []).append(query)
    return relevant


def _all(folder: str, part: str, columns: tuple[str, ...]) -> Iterator[JsonObject]:
    for piece in parquet_pieces(_parts(folder, part), 10**9, columns=columns[:2]):
        for row in read_parquet(piece, columns, texts=columns):
            if isinstance(row, Dropped):
                raise UserError(f"{row.where}: {row.reason}; without it the benchmark would not be whole")
            yield row[1]
