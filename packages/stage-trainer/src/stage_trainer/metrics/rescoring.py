"""Scores of candidates that are stored in fewer bits, as a search over them gives them.

The query stays float32. Of int8, uint8 and float16 it is compared with every candidate as restored. Of bits only those
with the most signs in common (a multiple of what is wanted) are compared with it, as sentence-transformers'
`semantic_search_faiss(rescore=True, rescore_multiplier=…)` does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stage_trainer.metrics.quantization import BITS, SCALARS, quantize_embeddings, ranges_of, restored
from stage_trainer.metrics.ranking import best

MULTIPLIER = 4
"""Of what is wanted, so many times as many are rescored."""

Scores = Callable[[np.ndarray], np.ndarray]
"""Queries `[Q, D]` to their scores with some candidates, `[Q, C]`; -inf where there is none."""

Index = Callable[[np.ndarray], Scores]
"""Candidates `[C, D]` to what scores them."""


def exact(candidates: np.ndarray) -> Scores:
    """Dot products in full precision."""
    return lambda queries: queries @ candidates.T


def stored_as(precision: str, most: int, multiplier: int = MULTIPLIER) -> Index:
    """Candidates stored in `precision`; those of int8 and uint8 have the ranges of these candidates.

    Args:
        most: candidates that are wanted of each query.

    Raises:
        UserError: by the index: the candidates cannot be stored like that.
    """

    def index(candidates: np.ndarray) -> Scores:
        ranges = ranges_of(candidates) if precision in SCALARS else None
        rows = restored(quantize_embeddings(candidates, precision, ranges), precision, ranges)
        return (lambda queries: _rescored(queries, rows, most * multiplier)) if precision in BITS else exact(rows)

    return index


def signs(queries: np.ndarray) -> np.ndarray:
    """What queries `[Q, D]` are compared with bits by: ±1 as those have it, at length one."""
    return restored(quantize_embeddings(queries, "ubinary"), "ubinary")


def _rescored(queries: np.ndarray, rows: np.ndarray, most: int) -> np.ndarray:
    queries, rows = queries.astype(np.float32), rows.astype(np.float32)
    found = best(signs(queries), rows, most)
    whole: np.ndarray = queries @ rows.T
    scores: np.ndarray = np.full_like(whole, -np.inf)
    np.put_along_axis(scores, found, np.take_along_axis(whole, found, axis=1), axis=1)
    return scores
