"""ViDoRe: the training set, and its benchmarks in BEIR's format (corpus, queries, qrels)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.names import is_hidden
from data_prep.samples import Text
from data_prep.shards.format import JsonObject
from data_prep.sources.answers import answer_text, chosen, listed, question_caption
from data_prep.sources.ids import same_id
from data_prep.sources.parquet import image_bytes, parquet_columns, parquet_pieces, read_parquet
from data_prep.sources.questions import DOCUMENTS
from data_prep.sources.records import Dropped, Found, ImageRecord, argument, from_rows, objects, option, usual_column
from data_prep.sources.texts import files_in, names_of

_COLUMNS = ("query", "image", "image_filename", "options", "answer", "page", "model", "prompt", "source")
_TEXTS = tuple(name for name in _COLUMNS if name != "image")
_ROWS = 500
# Names of columns in BEIR's form, in ViDoRe's third version, and in BEIR's own files.
_PAGE = ("corpus-id", "corpus_id", "_id", "id")
_QUERY = ("query-id", "query_id", "_id", "id")
_TEXT = ("query", "text")
_ABSENT = object()
_SEVERAL = "if the folder holds several benchmarks, name one of them"


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
        paths = files_in(self.files, (".parquet",))
        for path, name in zip(paths, names_of(paths), strict=True):
            for piece in parquet_pieces([path], _ROWS, columns=("query", "image")):
                yield {**piece, "shown": name}

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
        for part in ("qrels", "queries", "corpus"):
            _parts(self.folder, part)
        lost = _lost(self.folder, self.language)
        for path in _parts(self.folder, "corpus"):
            columns = _columns(path, (_PAGE, ("image",)))
            for piece in parquet_pieces([path], _ROWS, columns=columns):
                yield {**piece, "columns": columns, "lost": lost}
                lost = []

    def read(self, piece: JsonObject) -> Iterator[Found]:
        for where in piece["lost"]:
            yield Dropped("judgements of relevance whose query or page is not there", where)
        number, image = piece["columns"]
        for row in objects(read_parquet(piece, piece["columns"], texts=[number])):
            yield row if isinstance(row, Dropped) else self._record(row[0], row[1].get(number), row[1].get(image))

    def _record(self, where: str, number: object, image: object) -> Found:
        page, data = same_id(number), image_bytes(image)
        if page is None or data is None:
            return Dropped("no image" if data is None else "no corpus-id", where)
        asked = _relevant(self.folder, self.language)[0].get(page)
        return ImageRecord(where, page, data, short=asked or [Text(page, "und", "key")])


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
def _relevant(folder: str, language: str) -> tuple[dict[str, list[Text]], list[str]]:
    """Page → the queries that it answers; and the judgements that have no query, or cannot be read.

    Raises:
        UserError: a part lacks columns, two queries have one id, or a score is none.
    """
    queries: dict[str, Text] = {}
    lost: list[str] = []
    for row in _all(folder, "queries", (_QUERY, _TEXT), ("language",)):
        text, own, number = (None, None, None) if row is None else (row[1], row[2], same_id(row[0]))
        if number is None or not isinstance(text, str) or not text.strip():
            continue
        query = Text(text.strip(), own if isinstance(own, str) and own.strip() else language, "query", id=number)
        if queries.setdefault(number, query) != query:
            raise UserError(f"{folder}: two queries have the id {number!r}; {_SEVERAL}")
    relevant: dict[str, list[Text]] = {}
    for row in _all(folder, "qrels", (_QUERY[:2], _PAGE[:2]), ("score", "relevance")):
        if row is None:
            lost.append("qrels, a row that cannot be read")
            continue
        named = [value for value in row[2:] if value is not _ABSENT]
        score = named[0] if named else 1
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"{folder}: qrels hold the score {score!r}; expected numbers, above 0 for what is relevant")
        if score > 0:
            asked, page = queries.get(same_id(row[0]) or ""), same_id(row[1])
            if asked is not None and page is not None:
                relevant.setdefault(page, []).append(replace(asked, score=score))
            else:
                lost.append(f"qrels, query {row[0]!r:.80}, page {row[1]!r:.80}")
    return relevant, lost


def _lost(folder: str, language: str) -> list[str]:
    """The judgements of relevance that have no query or no page.

    Raises:
        UserError: no query asks for any page, or two pages have one id.
    """
    relevant, lost = _relevant(folder, language)
    pages: set[str] = set()
    for row in _all(folder, "corpus", (_PAGE,)):
        page = None if row is None else same_id(row[0])
        if page in pages:
            raise UserError(f"{folder}: two pages have the id {page!r}; {_SEVERAL}")
        pages |= {page} if page is not None else set()
    if not pages & relevant.keys():
        raise UserError(
            f"{folder}: no query asks for any page: judgements are of {_some(relevant)}, the corpus has "
            f"{_some(pages)}; are its parts those of one benchmark?"
        )
    gone = {page: queries for page, queries in relevant.items() if page not in pages}
    return [*lost, *(f"qrels, page {page!r:.80}, {one.text:.80}" for page, queries in gone.items() for one in queries)]


def _some(ids: Collection[str]) -> str:
    return ", ".join(sorted(ids)[:3]) + (f", … ({len(ids)})" if len(ids) > 3 else "") if ids else "none"


def _all(
    folder: str, part: str, columns: tuple[tuple[str, ...], ...], more: tuple[str, ...] = ()
) -> Iterator[list[Any] | None]:
    """The values of each row of a part, each column by one of its names, then those of `more`; None for a row that
    cannot be read."""
    for path in _parts(folder, part):
        names = _columns(path, columns)
        for piece in parquet_pieces([path], 10**9, columns=names):
            for row in read_parquet(piece, (*names, *more), texts=names):
                if isinstance(row, Dropped) and row.count > 1:
                    raise UserError(f"{row.where}: {row.reason}; without it the benchmark would not be whole")
                yield None if isinstance(row, Dropped) else [row[1].get(name, _ABSENT) for name in (*names, *more)]


def _columns(path: Path, columns: tuple[tuple[str, ...], ...]) -> list[str]:
    """The name that each of some columns has in a file. UserError if one is not there."""
    there = parquet_columns(path)
    found = [usual_column(there, usual) for usual in columns]
    if missing := [" or ".join(usual) for usual, name in zip(columns, found, strict=True) if not name]:
        raise UserError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(there)}")
    return found
