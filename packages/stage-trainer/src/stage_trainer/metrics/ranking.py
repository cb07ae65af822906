"""Rankings of candidates that may arrive in parts, and what trec_eval computes from them: hits and graded nDCG at k.

Equal scores are ordered as trec_eval orders them, by the candidates' ids, the greatest first. So a figure does not
depend on the order of the data, on batches, or on the device's `topk`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

_ID_BITS = 32
_NOTHING = -(2**63)
_QUERIES = 1024  # compared at a time: their scores with 50,000 candidates are 200 MB


class Best:
    """The k best candidates of each query, by the dot product of their vectors.

    Attributes:
        keys: int64 `[Q, k]`, best first: the score in the upper half, in an order-preserving form, the candidate's rank
            by id in the lower; so one `topk` of whole numbers, which are all different, decides ties too.
    """

    def __init__(self, queries: Tensor, k: int, own: Tensor | None = None):
        """Args:
        queries: vectors, float32 `[Q, D]`.
        own: int64 `[Q]`, the rank of a candidate that a query never finds (BEIR: the document with the query's id);
            -1 for none.
        """
        self.queries, self.k, self.own = queries, k, own
        self.keys = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)

    def add(self, candidates: Tensor, ranks: Tensor) -> None:
        """Takes further candidates.

        Args:
            candidates: vectors, float32 `[C, D]`.
            ranks: int64 `[C]`: the place of each candidate's id among all ids, sorted, from 0.
        """
        kept = []
        for first in range(0, len(self.queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            keys = (_sortable(self.queries[part] @ candidates.T) << _ID_BITS) | ranks
            if self.own is not None:
                keys = keys.masked_fill(ranks == self.own[part, None], _NOTHING)
            keys = torch.cat([self.keys[part], keys], dim=1)
            kept.append(keys.topk(min(self.k, keys.shape[1]), dim=1).values)
        if kept:
            self.keys = torch.cat(kept)

    def ranks(self) -> np.ndarray:
        """int64 `[Q, k]`: the found candidates' ranks by id, best first; -1 where there are fewer than k."""
        found = self.keys & (2**_ID_BITS - 1)
        shown: np.ndarray = found.masked_fill(self.keys == _NOTHING, -1).cpu().numpy()
        return shown


def best(queries: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """int64 `[Q, k]`: the numbers, which are the ids here, of the k best candidates `[C, D]` of each query `[Q, D]`.

    Both are float32, and of length one where cosines are meant.
    """
    found = Best(torch.from_numpy(queries), k)
    found.add(torch.from_numpy(candidates), torch.arange(len(candidates)))
    return found.ranks()


def hits(found: np.ndarray, relevant: Sequence[set[int]]) -> float:
    """The share of queries with something relevant among what was found, `[Q, k]`: trec_eval's `success_k`.

    It is CLIP_benchmark's recall@k; trec_eval's `recall_k` divides by the number of relevant ones instead.
    """
    return float(np.mean([not right.isdisjoint(row) for row, right in zip(found.tolist(), relevant, strict=True)]))


def ndcg(found: np.ndarray, gains: Sequence[Mapping[int, float]], k: int) -> np.ndarray:
    """float64 `[Q]`: nDCG at k of what was found, `[Q, k or more]`; gains are linear, as in trec_eval's `ndcg_cut_k`.

    Args:
        gains: of each query, candidate → grade; what is not there, or not above 0, is irrelevant. A query without
            anything relevant has 0.
    """
    values = []
    for row, grades in zip(found[:, :k].tolist(), gains, strict=True):
        ideal = _discounted(sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:k])
        reached = _discounted([max(grades.get(candidate, 0), 0) for candidate in row])
        values.append(reached / ideal if ideal else 0.0)
    return np.array(values)


def _discounted(gains: Sequence[float]) -> float:
    return float(sum(gain / np.log2(place + 2) for place, gain in enumerate(gains)))


def _sortable(scores: Tensor) -> Tensor:
    """int64 with the order of the float32 numbers: their bits, those below the sign turned over if they are negative.
    Adding 0 makes -0 equal to 0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
