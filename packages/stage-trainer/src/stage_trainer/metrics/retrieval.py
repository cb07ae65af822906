"""Retrieval metrics: recall@k with the level of a random guess, and nDCG@k."""

from __future__ import annotations

from math import comb

import numpy as np

from stage_trainer.metrics.rescoring import Index, exact

_QUERIES = 1024  # compared at a time: 25,000 captions with as many images would be gigabytes


def unit(x: np.ndarray) -> np.ndarray:
    """Rows `[N, D]` scaled to length one."""
    scaled: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return scaled


def recall_at_k(
    queries: np.ndarray, candidates: np.ndarray, relevant: np.ndarray, k: int = 5, index: Index = exact
) -> float:
    """The share of queries `[Q, D]` with something relevant (bool `[Q, C]`) among the k nearest candidates `[C, D]`.

    Args:
        index: how candidates are stored and scored.
    """
    k = min(k, len(candidates))
    hits, scores = 0, index(candidates)
    for first in range(0, len(queries), _QUERIES):
        part = slice(first, first + _QUERIES)
        nearest = np.argpartition(-scores(queries[part]), k - 1, axis=1)[:, :k]
        hits += int(np.take_along_axis(relevant[part], nearest, axis=1).any(axis=1).sum())
    return hits / len(queries)


def chance_at_k(relevant: np.ndarray, k: int = 5) -> float:
    """The recall of k random candidates; `relevant` is bool `[Q, C]`."""
    total = relevant.shape[1]
    return float(
        np.mean([1 - comb(total - int(r), k) / comb(total, k) if total >= k else 1.0 for r in relevant.sum(axis=1)])
    )


def ndcg_at_k(scores: np.ndarray, relevant: set[int], k: int = 10) -> float:
    """nDCG of one query, from the candidates' scores `[C]` and which of them are relevant, all equally."""
    top = np.argsort(-scores, kind="stable")[:k]
    gain = sum(1 / np.log2(place + 2) for place, candidate in enumerate(top) if int(candidate) in relevant)
    return float(gain / sum(1 / np.log2(place + 2) for place in range(min(k, len(relevant)))))
