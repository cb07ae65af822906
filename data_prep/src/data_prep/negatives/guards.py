"""Selects hard negatives among a query's neighbours, and guards against false ones (unlabelled right answers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import UserError


@dataclass(frozen=True)
class Guards:
    """The rules that keep right answers out.

    count: negatives for each query. ranks: first and last, from 1, among the neighbours that are no known answers; the
    very first ones are often unlabelled answers. margin: a negative's cosine similarity to the query is at least this
    much below that of the query's own answer.
    """

    count: int = 7
    ranks: tuple[int, int] = (10, 200)
    margin: float = 0.05

    def __post_init__(self) -> None:
        first, last = self.ranks
        if self.count < 1 or not 1 <= first <= last or last - first + 1 < self.count:
            raise UserError(f"ranks {first} to {last} for {self.count} negatives: expected 1 or more, and room for all")
        if not 0 <= self.margin < 2:
            raise UserError(f"margin {self.margin}: a difference of cosine similarities, expected 0 to 2")


@dataclass(frozen=True)
class Known:
    """What is known of N pairs.

    answers: `[N]`, the texts of each pair's answer, all alternatives, as numbers; equal texts have equal ones.
    items: `[N]` int64, what each pair is about.
    right: from a pair to the texts that answer its query, or (nearly) the same query of another pair.
    alike: called with a pair, a text and some others: whether the text is nearly one of them, or of the pair's query.
    """

    answers: Sequence[Sequence[int]]
    items: np.ndarray
    right: Callable[[int], set[int]]
    alike: Callable[[int, int, Sequence[int]], bool]


Negative = tuple[int, list[int]]
"""A pair, and the places of the alternatives of its answer that are negatives."""


def choose(
    query: int, near: Sequence[int], scores: Sequence[float], positive: float, known: Known, guards: Guards
) -> tuple[list[Negative], list[Negative], bool]:
    """(the hardest negatives of pair `query` that pass, up to `count`; others to fill up with; whether deeper
    neighbours may give more).

    A candidate passes if none of its answers, any alternative, is (nearly) a right one, or the query itself.
    Where some are, the rest may fill up: an alternative that many pairs share ("unknown") says little about them. Exact
    copies of answers do not count in the ranks.

    Args:
        near, scores: `[k]`, the pairs whose answers are nearest to the query, most similar first, and the similarities.
        positive: the similarity of the query to its own answer.
    """
    right = known.right(query)
    right_ones = sorted(right)
    taken: set[int] = set()
    found: list[Negative] = []
    spare: list[Negative] = []
    rank = 0
    for pair, score in zip(near, scores, strict=True):
        answers = known.answers[pair]
        if known.items[pair] == known.items[query] or taken.intersection(answers) or right.issuperset(answers):
            continue
        taken.update(set(answers) - right)  # copies of one answer count once, as negatives and in the ranks
        clean = right.isdisjoint(answers)
        rank += clean
        if rank > guards.ranks[1]:
            return found, spare, False
        if rank + len(spare) + (not clean) < guards.ranks[0] or score > positive - guards.margin:
            continue
        wrong = [
            place for place, one in enumerate(answers) if one not in right and not known.alike(query, one, right_ones)
        ]
        if len(wrong) == len(answers):
            found.append((pair, wrong))
            if len(found) == guards.count:
                return found, spare, False
        elif wrong and len(spare) < guards.count:
            spare.append((pair, wrong))
    return found, spare, rank < guards.ranks[1]
