"""Retrieval sets in BEIR's form, which MTEB and MS MARCO share: a corpus, queries, and judgements that join them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.shards.format import JsonObject
from data_prep.sources.beir_files import ID, QRELS, Part, find_part
from data_prep.sources.beir_triples import Groups, Mark, triples
from data_prep.sources.ids import same_id
from data_prep.sources.judged import NO_POSITIVE, Passage, with_title, without_doubtful
from data_prep.sources.records import Dropped, Found, Noted, argument, option
from data_prep.sources.tables import checked_file_stat
from data_prep.sources.text_rows import TextRows
from data_prep.sources.texts import Texts

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
    triples: str = option("", "file of positives and negatives by ids, in place of qrels: .jsonl, .parquet or .tsv")
    score_margin: float = option(0.0, "of --triples, leave out negatives scored less than this below the positive")

    def pieces(self) -> Iterator[JsonObject]:
        if self.min_score < 1:
            raise UserError(f"--min-score {self.min_score}: expected at least 1; 0 is judged irrelevant")
        self._rows()  # refuses options that contradict each other
        wanted = ("queries", "corpus") if self.triples else ("queries", "corpus", "qrels")
        parts = tuple(find_part(self.data, name, self.config, self.split) for name in wanted)
        stamps = [stamp for part in parts for stamp in part.stamps()]
        stamps += [checked_file_stat(Path(self.triples))] if self.triples else []
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
            known = [
                (replace(joined.documents[name], score=mark.score), mark.grade)
                for name, mark in judgements
                if name in joined.documents
            ]
            if len(known) < len(judgements):
                yield Noted("judgements of documents that are not in the corpus", len(judgements) - len(known))
            positives = [passage for passage, grade in known if grade >= self.min_score]
            negatives = [passage for passage, grade in known if grade <= 0]
            text, language = joined.queries[query]
            found = without_doubtful(text, positives, negatives, -math.inf)  # scores have had their say in `triples`
            if isinstance(found, str):
                missing = any(m.grade >= self.min_score and name not in joined.documents for name, m in judgements)
                yield Dropped("no relevant document in the corpus" if missing else NO_POSITIVE, where)
            else:
                yield from rows.record(where, found, language)

    def _rows(self) -> TextRows:
        return TextRows(Texts((), self.language, self.origin, self.negatives), self.language_column)


@dataclass(frozen=True)
class _Joined:
    """groups: query → (document, mark) of each, in the order of the judgements; queries: texts and languages;
    documents: those that are judged; lost: rows that could not be read."""

    groups: list[tuple[str, list[tuple[str, Mark]]]]
    queries: dict[str, tuple[str, str]]
    documents: dict[str, Passage]
    lost: list[Dropped | Noted]


@cache
def _join(source: Beir, parts: tuple[Part, ...]) -> _Joined:
    """Qrels, queries and corpus together, once a process; of the corpus only the judged documents are kept."""
    lost: list[Dropped | Noted] = []
    if source.triples:
        most = 2 * source.negatives  # some of them may not be in the corpus, or be empty
        groups = triples(Path(source.triples), source.score_margin, source.min_score, most, lost)
    else:
        groups = _judgements(parts[2], lost)
    languages = (source.language_column,) if source.language_column else ("language", "lang", "locale")
    queries: dict[str, tuple[str, str]] = {}
    twice: list[str] = []
    for where, row in _good(parts[0], (*ID, *_TEXT, *languages), lost):
        name, text = _id(row), next((row[column] for column in _TEXT if isinstance(row.get(column), str)), None)
        if name is None or text is None:
            lost.append(Dropped("query without an id or text", where))
        elif name in groups:
            said = next((row[column] for column in languages if isinstance(row.get(column), str)), "")
            if queries.setdefault(name, (text, said))[0] != text:
                twice.append(name)
    wanted = {name for judgements in groups.values() for name in judgements}
    _forget(queries, twice, "query", lost)
    documents: dict[str, Passage] = {}
    twice = []
    for where, row in _good(parts[1], (*ID, *_TEXT, "title"), lost):
        name, text = _id(row), next((row[column] for column in _TEXT if isinstance(row.get(column), str)), None)
        if name is None or text is None:
            lost.append(Dropped("document without an id or text", where))
        elif name in wanted and documents.setdefault(name, whole := with_title(row.get("title"), text)) != whole:
            twice.append(name)
    _forget(documents, twice, "document", lost)
    for what, found, asked in (("queries", queries, set(groups)), ("corpus", documents, wanted)):
        if not asked & found.keys():
            example = f"{min(asked)!r}, for example" if asked else "none"
            raise UserError(
                f"{source.data}: no id of the judgements is among those of the {what}; they ask for {example}"
            )
    return _Joined([(query, list(found.items())) for query, found in groups.items()], queries, documents, lost)


def _forget(found: dict[str, Any], twice: list[str], what: str, lost: list[Dropped | Noted]) -> None:
    """Takes out what two rows with one id say differently: nobody knows which of them is judged."""
    for name, count in Counter(twice).items():
        del found[name]
        lost.append(Dropped(f"{what} id of two different texts", f"{what} {name}", 1 + count))


def _judgements(part: Part, lost: list[Dropped | Noted]) -> Groups:
    """Query → (document, score) of each. Where a pair is judged twice, the last judgement counts, as in BEIR."""
    groups: Groups = {}
    for where, row in _good(part, QRELS, lost):
        query, document, score = (same_id(row.get(name)) for name in QRELS)
        try:
            grade = float(score or "")
        except ValueError:
            grade = math.nan
        if query is None or document is None or not math.isfinite(grade):
            lost.append(Dropped("judgement without query-id, corpus-id and a number as score", where))
        else:
            groups.setdefault(query, {})[document] = Mark(grade)
    return groups


def _good(part: Part, columns: Sequence[str], lost: list[Dropped | Noted]) -> Iterator[tuple[str, JsonObject]]:
    """The rows of a part; those that cannot be read go to `lost`."""
    for row in part.rows(columns):
        if isinstance(row, Dropped):
            lost.append(row)
        else:
            yield row


def _id(row: JsonObject) -> str | None:
    return next((name for column in ID if (name := same_id(row.get(column))) is not None), None)
