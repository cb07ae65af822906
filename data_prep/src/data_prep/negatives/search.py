"""Nearest neighbours by inner product, with faiss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import numpy as np

from data_prep.errors import needs

EXACT_UP_TO = 200_000
_PROBED = 64  # lists searched for each query, of 4·√N
_TRAINED_ON = 64  # vectors a list


def build_index(
    parts: Callable[[], Iterable[np.ndarray]], count: int, *, exact_up_to: int = EXACT_UP_TO, seed: int = 0
) -> Any:
    """A faiss index over the `count` vectors of `parts()`, `[n, D]` each: exact, or inverted lists for many.

    Inverted lists are trained on a sample drawn with `seed`, for which `parts` is called once more.
    """
    faiss = needs("faiss", extra="negatives", what="mining negatives")
    width = next(iter(parts())).shape[1]
    if count <= exact_up_to:
        index = faiss.IndexFlatIP(width)
    else:
        lists = int(4 * sqrt(count))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(_PROBED, lists)
        share = min(1.0, _TRAINED_ON * lists / count)
        draw = np.random.default_rng(seed)
        index.train(np.concatenate([_floats(part[draw.random(len(part)) < share]) for part in parts()]))
    for part in parts():
        index.add(_floats(part))
    return index


def search(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, numbers) of the `k` nearest of each query, `[Q, k]`, nearest first; number -1 where there is none."""
    scores, numbers = index.search(_floats(queries), min(k, index.ntotal))
    return scores, numbers


def _floats(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, np.float32)
