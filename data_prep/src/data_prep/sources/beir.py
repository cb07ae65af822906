"""Retrieval sets in BEIR's form, which MTEB and MS MARCO share: a corpus, queries, and judgements that join them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.shards.format import JsonObject
from data_prep.sources.beir_files import ID, QRELS, Part, find_part
from data_prep.sources.judged import NO_POSITIVE, Passage, with_title, without_doubtful
from data_prep.sources.records import Dropped, Found, Noted, argument, option
from data_prep.sources.text_rows import TextRows

_QUERIES = 1000  # of a piece
_TEXT = ("text", "query", "passage", "contents", "body")


@dataclass(frozen=True)
class Beir:
    """BEIR, MTEB and MS MARCO: a corpus, queries and judgements (qrels), as JSON lines, parquet or TSV

    A query with the documents that are judged relevant is a pair; with enough documents that are judged irrelevant
    (score 0) a triplet. Documents without a judgement are neither. Title and text of a document are joined by a space.
    """

    image: ClassVar[ImageRule | None] = None

    data: str = argument("folder with corpus, queries and qrels, or OWNER/NAME on the hub")
    split: str = option("train", "split of the judgements; leave test out of training")
    config: str = option("", "language or subset, where parts are called CONFIG-corpus, CONFIG-queries, CONFIG-qrels")
    min_score: int = option(1, "judgements of at least this are relevant; those below, but above 0, are left out")
    language: str = option("und", "language of the texts, ISO 639-1; QUERY,TARGET if they differ")
    language_column: str = option("", "column of the query's language (default: language, lang, locale)")
    origin: str = option("human", "where the texts came from: human, machine-translation, synthetic:MODEL")
    negatives: int = option(7, "negatives of a triplet; what has more is cut")

    def pieces(self) -> Iterator[JsonObject]:
        if self.min_score < 1:
            raise UserError(f"--min-score {self.min_score}: expected at least 1; 0 is judged irrelevant")
        self._rows()  # refuses options that contradict each other
        parts = tuple(find_part(self.data, name, self.config, self.split) for name in ("qrels", "queries", "corpus"))
        stamps = [stamp for part in parts for stamp in part.stamps()]
        shared: JsonObject = {"file": self.data, "parts": [asdict(part) for part in parts], "stamps": stamps}
        for first in range(0, max(len(_join(self, parts).groups), 1), _QUERIES):
            yield {**shared, "first": first, "end": first + _QUERIES}

    def read(self, piece: JsonObject) -> Iterator[Found]:
        parts = (Part(part["name"], tuple(map(tuple, part["files"]))) for part in piece["parts"])
        joined, rows = _join(self, tuple(parts)), self._rows()
        if not piece["first"]:
            yield from joined.lost
        for query, judgements in joined.groups[piece["first"] : piece["end"]]:
            where = f"query {query}"
            if query not in joined.queries:
                yield Dropped("query with judgements that is not among the queries", where)
                continue
            known = [(joined.documents[name], score) for name, score in judgements if name in joined.documents]
            if len(known) < len(judgements):
                yield Noted("judgements of documents that are not in the corpus", len(judgements) - len(known))
            positives = [passage for passage, score in known if score >= self.min_score]
            negatives = [passage for passage, score in known if score <= 0]
            text, language = joined.queries[query]
            found = without_doubtful(text, positives, negatives, 0.0)
            if isinstance(found, str):
                missing = any(score >= self.min_score and name not in joined.documents for name, score in judgements)
                yield Dropped("no relevant document in the corpus" if missing else NO_POSITIVE, where)
            else:
                yield from rows.record(where, found, language)

    def _rows(self) -> TextRows:
        return TextRows(self.language, self.language_column, self.origin, self.negatives)


@dataclass(frozen=True)
class _Joined:
    """groups: query → (document, score) of each, in the order of the judgements; queries: texts and languages;
    documents: those that are judged; lost: rows that could not be read."""

    groups: list[tuple[str, list[tuple[str, float]]]]
    queries: dict[str, tuple[str, str]]
    documents: dict[str, Passage]
    lost: list[Dropped]


@cache
def _join(source: Beir, parts: tuple[Part, ...]) -> _Joined:
    """Qrels, queries and corpus together, once a process; of the corpus only the judged documents are kept."""
    lost: list[Dropped] = []
    groups = _judgements(parts[0], lost)
    languages = (source.language_column,) if source.language_column else ("language", "lang", "locale")
    queries: dict[str, tuple[str, str]] = {}
    for where, row in _good(parts[1], (*ID, *_TEXT, *languages), lost):
        name, text = _id(row), next((row[column] for column in _TEXT if isinstance(row.get(column), str)), None)
        if name is None or text is None:
            lost.append(Dropped("query without an id or text", where))
        elif name in groups:
            said = next((row[column] for column in languages if isinstance(row.get(column), str)), "")
            queries[name] = text, said
    wanted = {name for judgements in groups.values() for name, _ in judgements}
    documents: dict[str, Passage] = {}
    for where, row in _good(parts[2], (*ID, *_TEXT, "title"), lost):
        name, text = _id(row), next((row[column] for column in _TEXT if isinstance(row.get(column), str)), None)
        if name is None or text is None:
            lost.append(Dropped("document without an id or text", where))
        elif name in wanted:
            documents[name] = with_title(row.get("title"), text)
    for what, found, asked in (("queries", queries, set(groups)), ("corpus", documents, wanted)):
        if not asked & found.keys():
            example = f"{min(asked)!r}, for example" if asked else "none"
            raise UserError(
                f"{source.data}: no id of the judgements is among those of the {what}; they ask for {example}"
            )
    return _Joined(list(groups.items()), queries, documents, lost)


def _judgements(part: Part, lost: list[Dropped]) -> dict[str, list[tuple[str, float]]]:
    """Query → (document, score) of each. Where a pair is judged twice, the last judgement counts, as in BEIR."""
    groups: dict[str, dict[str, float]] = {}
    for where, row in _good(part, QRELS, lost):
        query, document, score = (plain_id(row.get(name)) for name in QRELS)
        try:
            grade = float(score or "")
        except ValueError:
            grade = math.nan
        if query is None or document is None or not math.isfinite(grade):
            lost.append(Dropped("judgement without query-id, corpus-id and a number as score", where))
        else:
            groups.setdefault(query, {})[document] = grade
    return {query: list(judged.items()) for query, judged in groups.items()}


def _good(part: Part, columns: Sequence[str], lost: list[Dropped]) -> Iterator[tuple[str, JsonObject]]:
    """The rows of a part; those that cannot be read go to `lost`."""
    for row in part.rows(columns):
        if isinstance(row, Dropped):
            lost.append(row)
        else:
            yield row


def _id(row: JsonObject) -> str | None:
    return next((name for column in ID if (name := plain_id(row.get(column))) is not None), None)


def plain_id(value: Any) -> str | None:
    """An id as text: 3, 3.0 and "3" are one. None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value != value:
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
