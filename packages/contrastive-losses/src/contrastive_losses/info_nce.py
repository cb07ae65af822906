"""Bidirectional InfoNCE over Matryoshka prefixes, with hard negatives: the plain form, one prefix after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_losses.batch import Batch, problem_with_batch, problem_with_dims, problem_with_temperature
from contrastive_losses.ranks import Group, gather_batch

SMALLEST_NORM = 1e-12  # a prefix no longer than this counts as the zero vector
MASKED = torch.finfo(torch.float32).min  # exp(MASKED) is 0; unlike -inf it leaves no nan behind a row without negatives


@dataclass(frozen=True)
class LossStats:
    """How well the whole batch is told apart, for each dim.

    Detached tensors of shape `[len(dims)]` on the device of the loss, computed without making the host wait for it.
    Means over the batch are weighted by `sample_weights`, like the loss.
    """

    dims: tuple[int, ...]
    query_to_target_accuracy: Tensor
    """Share of queries closer to their own target than to all their negatives, hard ones too. A tie is a miss."""
    target_to_query_accuracy: Tensor
    """Share of targets closer to their own query than to all other queries that are their negatives."""
    positive_cosine: Tensor
    """Mean cosine of the pairs."""
    hardest_negative_cosine: Tensor
    """Mean, over queries that have a negative, of the largest cosine with one; nan if no query has any."""


def matryoshka_info_nce(
    queries: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    negatives: Tensor | None = None,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    sample_weights: Tensor | None = None,
    group: Group | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """InfoNCE in both directions, summed over prefixes of the embeddings (jina-clip-v2, arXiv 2412.08802, section 3.3;
    hard negatives as in its section 3.4; prefixes as in arXiv 2205.13147).

    With l(a, b) the cosine of two prefixes over the temperature, one prefix gives the sum of the two directions' means:

        q->t:  -1/B sum_i log exp l(q_i, t_i) / (sum_j exp l(q_i, t_j) + sum_jk exp l(q_i, n_jk))
        t->q:  -1/B sum_i log exp l(q_i, t_i) /  sum_j exp l(q_j, t_i)

    Every query sees the hard negatives of the whole batch, not only its own; no target sees any.

    Args:
        queries: `[B, D]`, unnormalised: every prefix is normalised here. A prefix no longer than 1e-12 counts as the
            zero vector: its cosine with everything is 0 and so is its gradient.
        targets: `[B, D]`, row i the positive of query i.
        temperature: above 0; a number, or a tensor of shape `[]` or `[1]` with or without gradient. The value of a
            tensor is checked on the CPU only, because looking at it elsewhere would make the host wait.
        negatives: `[B, K, D]`, K hard negatives for each query.
        dims: prefix lengths between 1 and D, in any order, each counted as often as it stands there. None is `(D,)`.
        weights: one factor for each of `dims`, in the same order. None is 1 for each.
        query_ids: `[B]` int64. Pairs with an equal query id are never each other's negatives, in both directions.
            The positive itself is never masked, nor are hard negatives, which have no id.
        target_ids: `[B]` int64, the same for targets. The two kinds of id are never compared with each other.
        sample_weights: `[B]`, 0 or more, without gradient: each mean over the batch becomes `sum(w * x) / sum(w)`. A
            row of weight 0 still is a negative for the others; if all are 0, so is the loss.
        group: a process group: the batch is then the rows of all its ranks, and every rank must call. The number of
            rows may differ between ranks and be 0 on some; all else must agree. Every rank returns the identical loss
            of the whole batch. Its input gradients are W (the number of ranks) times the derivative of that loss and
            its temperature gradient is the derivative, so that parameter gradients *averaged* over ranks, as by DDP
            and DeepSpeed, are those of one process with the whole batch. None: no communication, whatever is launched.
        return_stats: return `(loss, LossStats)`.

    Returns:
        The loss, 0-d: float64 if any embeddings are, else float32, whatever autocast says. About
        `2.5 * B * (B + B * K)` numbers for each dim stay in memory until backward, B being the rows of all ranks.

    Raises:
        ValueError: shapes, dims, weights or temperature that do not fit. With a group, on every rank, whichever has
            the bad input and also if the ranks disagree, so that none is left waiting.
    """
    batch = Batch(queries, targets, negatives, query_ids, target_ids, sample_weights)
    problem = (
        problem_with_batch(batch)
        or problem_with_dims(dims, weights, width=queries.shape[-1])
        or problem_with_temperature(temperature)
    )
    dims = tuple(queries.shape[-1:] if dims is None else dims)
    weights = (1.0,) * len(dims) if weights is None else tuple(float(weight) for weight in weights)
    if group is not None:
        batch = gather_batch(batch, problem, (dims, weights), group)
    elif problem is not None:
        raise ValueError(problem)
    elif len(queries) == 0:
        raise ValueError("the batch has no rows; expected at least one pair")

    with torch.autocast(queries.device.type, enabled=False):
        return _loss_of_whole_batch(batch, temperature, dims, weights, return_stats)


def _loss_of_whole_batch(
    batch: Batch, temperature: float | Tensor, dims: Sequence[int], weights: Sequence[float], return_stats: bool
) -> Tensor | tuple[Tensor, LossStats]:
    queries, targets = batch.queries, batch.targets
    columns = targets if batch.negatives is None else torch.cat([targets, batch.negatives.flatten(0, 1)])
    dtype = torch.promote_types(torch.promote_types(queries.dtype, columns.dtype), torch.float32)
    queries, columns = queries.to(dtype), columns.to(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(queries.device, dtype)
    size = len(queries)
    sample_weights = _normalised_sample_weights(batch, dtype)
    not_negative = F.pad(_same_ids(batch), (0, len(columns) - size))  # [B, B + B*K]; hard negatives always count

    loss, stats = queries.new_zeros(()), []
    for dim, weight in zip(dims, weights, strict=True):
        logits = _unit_rows(queries[:, :dim]) @ _unit_rows(columns[:, :dim]).T / temperature
        positive = logits.diagonal()
        negative = logits.masked_fill(not_negative, MASKED)  # after the division, which has a gradient to keep clean
        # -log(exp(p) / (exp(p) + sum of exp(negatives))) = softplus(logsumexp(negatives) - p). Unlike a cross entropy
        # over all columns, this does not subtract two nearly equal numbers when the batch is almost solved.
        query_to_target = F.softplus(negative.logsumexp(1) - positive, threshold=50)
        target_to_query = F.softplus(negative[:, :size].logsumexp(0) - positive, threshold=50)
        loss = loss + weight * (sample_weights * (query_to_target + target_to_query)).sum()
        if return_stats:
            stats.append(_stats_of_one_dim(positive.detach(), negative.detach(), temperature, sample_weights))
    if not return_stats:
        return loss
    return loss, LossStats(tuple(dims), *(torch.stack(values) for values in zip(*stats, strict=True)))


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their length; zero rows stay zero and get a zero gradient, not one of 1 / eps."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    is_zero = norms <= SMALLEST_NORM
    return (rows / norms.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def _same_ids(batch: Batch) -> Tensor:
    """`[B, B]` bool: the pairs (i, j) that are no negatives of each other, the diagonal of positives among them."""
    same = torch.eye(len(batch.queries), dtype=torch.bool, device=batch.queries.device)
    for ids in (batch.query_ids, batch.target_ids):
        if ids is not None:
            same = same | (ids[:, None] == ids)
    return same


def _normalised_sample_weights(batch: Batch, dtype: torch.dtype) -> Tensor:
    """`[B]`, summing to 1 (or all 0)."""
    if batch.sample_weights is None:
        size = len(batch.queries)
        return torch.full((size,), 1.0 / size, dtype=dtype, device=batch.queries.device)
    weights = batch.sample_weights.detach().to(dtype)
    return weights / weights.sum().clamp_min(torch.finfo(dtype).tiny)


@torch.no_grad()
def _stats_of_one_dim(
    positive: Tensor, negative: Tensor, temperature: float | Tensor, sample_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four numbers of LossStats, in its order, from logits: `positive` [B] and `negative` [B, B + B*K]."""
    hardest = negative.amax(1)
    has_negative = hardest > MASKED
    weights_with_negative = sample_weights * has_negative
    hardest_cosine = (hardest * temperature).masked_fill(~has_negative, 0.0)
    return (
        (sample_weights * (positive > hardest)).sum(),
        (sample_weights * (positive > negative[:, : len(positive)].amax(0))).sum(),
        (sample_weights * positive * temperature).sum(),
        (weights_with_negative * hardest_cosine).sum() / weights_with_negative.sum(),
    )
