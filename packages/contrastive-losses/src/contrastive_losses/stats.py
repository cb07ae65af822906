"""Accuracies and cosines of a batch, from the tiles of its loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Cosines closer than this are a tie. Products of the same two rows differ by about as much with the order of summation.
TIE = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass(frozen=True)
class LossStats:
    """How well the whole batch is separated, for each dim.

    Detached tensors of shape `[len(dims)]` on the device of the loss, the same on every rank; the host does not wait
    for them. Means over the batch are weighted by `sample_weights`, like the loss. Pairs that ids or a margin exclude
    are not negatives here either.
    """

    dims: tuple[int, ...]
    query_to_target_accuracy: Tensor
    """Share of queries closer to their own target than to all their negatives, hard ones too. A tie is a miss, and
    cosines within 1e-6 of each other are one (1e-13 in float64)."""
    target_to_query_accuracy: Tensor
    """Share of targets closer to their own query than to all other queries that are their negatives."""
    positive_cosine: Tensor
    """Mean cosine of the pairs."""
    hardest_negative_cosine: Tensor
    """Mean, over queries that have a negative, of the largest cosine with one; nan if no query has any."""


def weighted_sums(positive: Tensor, row_max: Tensor, column_max: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`[5, P]`: the four numbers of `LossStats` of some pairs as sums to be added up over ranks, the last one as a
    numerator and its denominator. From cosines `[P, b]` and weights `[b]` that add up to 1 over all ranks."""
    has_negative = row_max > -torch.inf
    return torch.stack(
        [
            (positive - row_max > TIE[dtype]).double() @ weights,
            (positive - column_max > TIE[dtype]).double() @ weights,
            positive @ weights,
            row_max.masked_fill(~has_negative, 0.0) @ weights,
            has_negative.double() @ weights,
        ]
    )


def stats_of(sums: Tensor, dims: tuple[int, ...], at: list[int], dtype: torch.dtype) -> LossStats:
    """From the `weighted_sums` of all ranks; dim k of the result is prefix `at[k]` of the sums."""
    # Not sums[:, at]: a list as an index is copied to the device, for which the host waits.
    forward, backward, positive, hardest, share = torch.stack([sums[:, k] for k in at], dim=1).to(dtype)
    return LossStats(dims, forward, backward, positive, hardest / share)
