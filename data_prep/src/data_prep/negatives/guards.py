"""Selects hard negatives among a query's neighbours, and guards against false ones (unlabelled right answers)."""

from __future__ import annotations

from collections.abc import Callable
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
    """Groups of N pairs, each `[N]` int64: pairs with equal numbers have (nearly) the same query, (nearly) the same
    answer, or the same item.
    """

    query: np.ndarray
    answer: np.ndarray
    item: np.ndarray

    def answers_of(self) -> Callable[[int], set[int]]:
        """A function from a query to the answers of all pairs with that query."""
        order = np.argsort(self.query, kind="stable")
        queries = self.query[order]

        def of(query: int) -> set[int]:
            begin, end = np.searchsorted(queries, [query, query + 1])
            return set(self.answer[order[begin:end]].tolist())

        return of


def choose(
    neighbours: np.ndarray,
    scores: np.ndarray,
    positives: np.ndarray,
    first: int,
    known: Known,
    answers_of: Callable[[int], set[int]],
    guards: Guards,
) -> np.ndarray:
    """The hardest negatives that pass, `[Q, count]` int64; a row of -1 where there are too few.

    Args:
        neighbours, scores: `[Q, k]`, pairs whose answers are nearest to queries `first`, `first` + 1, …, most similar
            first, and their cosine similarities; -1 where there is none.
        positives: `[Q]`, the similarity of each query to its own answer.
    """
    chosen = np.full((len(neighbours), guards.count), -1, np.int64)
    for row, (near, similar) in enumerate(zip(neighbours.tolist(), scores.tolist(), strict=True)):
        query, most = first + row, float(positives[row]) - guards.margin
        right = answers_of(int(known.query[query])) | {int(known.answer[query])}
        taken: set[int] = set()
        found: list[int] = []
        for pair, score in zip(near, similar, strict=True):
            if pair < 0 or len(taken) == guards.ranks[1] or len(found) == guards.count:
                break
            answer = int(known.answer[pair])
            if answer in right or known.item[pair] == known.item[query] or answer in taken:
                continue
            taken.add(answer)  # copies of one answer count once, as negatives and in the ranks
            if len(taken) >= guards.ranks[0] and score <= most:
                found.append(pair)
        if len(found) == guards.count:
            chosen[row] = found
    return chosen
