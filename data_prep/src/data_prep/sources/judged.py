"""Queries with judged passages, as retrieval sets publish them: which are positives, which are negatives.

What a row says about its passages is read as what it is. 0/1 judgements (`is_selected`, `labels`) part positives from
negatives. Scores of a teacher (FlagEmbedding's `pos_scores` and `neg_scores`, sentence-transformers' `score`) take
negatives away: one that the teacher likes as much as the positive is probably an answer. No score makes a positive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from data_prep.shards.format import JsonObject

_QUERY = ("query", "question", "anchor")
_POSITIVE = ("positive_passages", "pos", "positives", "positive")
_NEGATIVE = ("negative_passages", "neg", "negatives", "negative", "hard_negatives")
_CANDIDATES = ("passages", "docs", "documents", "candidates")
_JUDGEMENTS = ("is_selected", "labels", "label")
_TEXT = ("passage_text", "text", "passage", "contents", "content")
_SCORES = ("score", "scores", "label")

NO_POSITIVE = "no passage that is judged right"
NOT_JUDGED = "passages with scores alone, none judged right"
_ODD = "passages of no known form"
_NO_SCORES = "scores that are no numbers, or not as many as passages"


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage. joined: title and text, put together by us. score: a teacher's; None if there is none."""

    text: str
    joined: bool = False
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A query, the passages that answer it and those that do not; `left_out` negatives were taken away."""

    query: str
    positives: list[Passage]
    negatives: list[Passage]
    left_out: int = 0

    def scores(self, count: int) -> list[float] | None:
        """A teacher's scores of the positive and of the first `count` negatives; None unless each has one and there is
        one positive: of several any may be drawn, and one score cannot be that of all."""
        found = [passage.score for passage in (*self.positives, *self.negatives[:count])]
        known = [score for score in found if score is not None and math.isfinite(score)]
        return known if len(self.positives) == 1 and len(known) == len(found) else None


def judged(row: JsonObject, margin: float) -> Judged | str | None:
    """What a row says of its passages; a reason to drop it; or None if it is of no such form.

    Args:
        margin: negatives stay whose score is more than this below the lowest of the positives.
    """
    query = next((row[name] for name in _QUERY if isinstance(row.get(name), str)), None)
    if query is None:
        return None
    candidates = next((row[name] for name in _CANDIDATES if isinstance(row.get(name), list | dict)), None)
    if candidates is not None:
        return _of_candidates(query, row, candidates, margin)
    named = _negative_names(row)
    positive = next((row[name] for name in _POSITIVE if row.get(name) is not None), None)
    if positive is None or not (named or isinstance(positive, list | dict)):
        return None
    positives, parts = passages(positive), [passages(row[name]) for name in named]
    if positives is None or None in parts:
        return _ODD
    negatives = [passage for part in parts for passage in part or ()]
    if not negatives and any(row.get(name) not in (None, 1, True, "1") for name in _JUDGEMENTS):
        return "labelled as no match"
    scored = _with_scores(row, positives, negatives)
    return scored if isinstance(scored, str) else without_doubtful(query, *scored, margin)


def passages(value: Any) -> list[Passage] | None:
    """The passages of a text, a list of texts, a list of {title, text, …}, or lists side by side in an object, which is
    how the datasets library gives a list of structs. None if it is something else."""
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if columns:
            value = [dict(zip(columns, cells, strict=False)) for cells in zip(*columns.values(), strict=False)]
    found = [_passage(each) for each in (value if isinstance(value, list) else [value])]
    return None if None in found else [passage for passage in found if passage is not None]


def with_title(title: Any, text: str) -> Passage:
    """Title and text of a document, joined by a space as in BEIR; a title alone or none leaves the text as it is."""
    if not isinstance(title, str) or not title.strip():
        return Passage(text)
    return Passage(f"{title} {text}", joined=True) if text.strip() else Passage(title)


def _passage(value: Any) -> Passage | None:
    if isinstance(value, str):
        return Passage(value)
    if not isinstance(value, dict):
        return None
    text = next((value[name] for name in _TEXT if isinstance(value.get(name), str)), None)
    if text is None:
        return None
    passage = with_title(value.get("title"), text)
    return Passage(passage.text, passage.joined, _number(value.get("score")))


def _of_candidates(query: str, row: JsonObject, value: Any, margin: float) -> Judged | str | None:
    """Passages in one list, with judgements beside or inside it."""
    found = passages(value)
    if found is None:
        return _ODD
    inner = value if isinstance(value, dict) else {}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inner = {name: [each.get(name) for each in value if isinstance(each, dict)] for name in _JUDGEMENTS}
        inner = {name: marks for name, marks in inner.items() if marks[0] is not None}
    marks = next((place[name] for place in (inner, row) for name in _JUDGEMENTS if name in place), None)
    if not isinstance(marks, list):
        return NOT_JUDGED if any(name in row for name in _SCORES) else None
    if len(marks) != len(found):
        return "not as many judgements as passages"
    if not all(isinstance(mark, bool) or (isinstance(mark, int | float) and mark in (0, 1)) for mark in marks):
        return "judgements other than 0 and 1"
    parts: tuple[list[Passage], list[Passage]] = [], []
    for mark, passage in zip(marks, found, strict=True):
        parts[0 if mark else 1].append(passage)
    return without_doubtful(query, *parts, margin)


def _negative_names(row: JsonObject) -> list[str]:
    """The columns of negatives: usual names, and negative_1, negative_2, …"""
    numbered = [name for name in row if name.startswith(("negative_", "neg_")) and name.rpartition("_")[2].isdigit()]
    return [name for name in (*_NEGATIVE, *numbered) if row.get(name) is not None]


def _with_scores(
    row: JsonObject, positives: list[Passage], negatives: list[Passage]
) -> tuple[list[Passage], list[Passage]] | str:
    """The passages with the scores of the row: a list for each, one list for all, or the margin of one negative."""
    whole = positives + negatives
    scores: list[Any] = [passage.score for passage in whole]
    if row.get("pos_scores") is not None or row.get("neg_scores") is not None:
        parts = row.get("pos_scores") or [None] * len(positives), row.get("neg_scores") or [None] * len(negatives)
        if not all(isinstance(part, list) for part in parts):
            return _NO_SCORES
        scores = [*parts[0], *parts[1]]
    elif (given := next((row[name] for name in _SCORES if row.get(name) is not None), None)) is not None:
        given = given if isinstance(given, list) else [given]
        one = len(positives) == 1
        scores = _below(given) if one and len(given) == len(negatives) else given
    if len(scores) != len(whole) or any(score is not None and _number(score) is None for score in scores):
        return _NO_SCORES
    scored = [Passage(each.text, each.joined, _number(score)) for each, score in zip(whole, scores, strict=True)]
    return scored[: len(positives)], scored[len(positives) :]


def _below(margins: list[Any]) -> list[Any]:
    """Scores of a positive and its negatives, of which only the differences are known."""
    return [0.0, *(margin if (known := _number(margin)) is None else -known for margin in margins)]


def without_doubtful(query: str, positives: list[Passage], negatives: list[Passage], margin: float) -> Judged | str:
    """Leave out negatives that say what a positive says, or that a teacher does not put clearly below it."""
    positives = [passage for passage in positives if passage.text.strip()]
    if not positives:
        return NO_POSITIVE
    right = {passage.text for passage in positives}
    least = min((passage.score for passage in positives if passage.score is not None), default=None)
    stay = [
        passage
        for passage in negatives
        if passage.text not in right
        and not (least is not None and passage.score is not None and passage.score >= least - margin)
        and passage.text.strip()
    ]
    return Judged(query, positives, stay, len(negatives) - len(stay))


def _number(value: Any) -> float | None:
    """A number, also one in a text; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number == number else None
