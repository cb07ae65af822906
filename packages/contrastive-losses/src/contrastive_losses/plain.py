"""The losses in plain PyTorch: what the fused ones compute, one prefix and one matrix at a time.

Read this to learn what a loss is; train with `matryoshka_info_nce`, `matryoshka_sigmoid`, `matryoshka_cosent` or
`matryoshka_margin_mse`. Tests compare the two.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_losses.batch import SMALLEST_NORM

MASKED = torch.finfo(torch.float32).min  # exp(MASKED) is 0; unlike -inf it leaves no nan behind a row without negatives


def plain_info_nce(
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
    false_negative_margin: float | None = None,
) -> Tensor:
    """`matryoshka_info_nce` of one process by ordinary autograd. The arguments are the same, and are not checked."""
    size, width = queries.shape
    dims = (width,) if dims is None else dims
    weights = (1.0,) * len(dims) if weights is None else weights
    share = queries.new_ones(size) if sample_weights is None else sample_weights.to(queries)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    columns = targets if negatives is None else torch.cat([targets, negatives.flatten(0, 1)])
    same = _same_pair_or_id(size, query_ids, target_ids, queries.device)
    hidden = F.pad(same, (0, len(columns) - size))  # [B, B + B*K]; hard negatives have no ids

    loss = queries.new_zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        cosine = unit_rows(queries[:, :dim]) @ unit_rows(columns[:, :dim]).T
        own = cosine.diagonal()
        from_rows, from_columns = hidden, same
        if false_negative_margin is not None:
            from_rows = hidden | (cosine > own[:, None] + false_negative_margin)
            from_columns = same | (cosine[:, :size] > own + false_negative_margin)
        logits, positive = cosine / temperature, own / temperature
        # -log(exp(p) / (exp(p) + sum of exp(negatives))) = softplus(logsumexp(negatives) - p). Unlike a cross entropy
        # over all columns, this subtracts no nearly equal numbers when the batch is almost solved.
        query_to_target = logits.masked_fill(from_rows, MASKED).logsumexp(1) - positive
        target_to_query = logits[:, :size].masked_fill(from_columns, MASKED).logsumexp(0) - positive
        losses = F.softplus(query_to_target, threshold=50) + F.softplus(target_to_query, threshold=50)
        loss = loss + weight * (share * losses).sum()
    return loss


def plain_sigmoid(
    queries: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    negatives: Tensor | None = None,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    sample_weights: Tensor | None = None,
    false_negative_margin: float | None = None,
) -> Tensor:
    """`matryoshka_sigmoid` of one process by ordinary autograd. The arguments are the same, and are not checked."""
    size, width = queries.shape
    dims = (width,) if dims is None else dims
    weights = (1.0,) * len(dims) if weights is None else weights
    share = queries.new_ones(size) if sample_weights is None else sample_weights.to(queries)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    columns = targets if negatives is None else torch.cat([targets, negatives.flatten(0, 1)])
    hidden = F.pad(_same_pair_or_id(size, query_ids, target_ids, queries.device), (0, len(columns) - size))

    loss = queries.new_zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        cosine = unit_rows(queries[:, :dim]) @ unit_rows(columns[:, :dim]).T
        own = cosine.diagonal()
        left_out = hidden
        if false_negative_margin is not None:
            left_out = hidden | (cosine > own[:, None] + false_negative_margin)
        repelled = F.softplus(cosine / temperature + bias, threshold=50).masked_fill(left_out, 0.0).sum(1)
        attracted = F.softplus(-(own / temperature + bias), threshold=50)
        loss = loss + weight * (share * (attracted + repelled)).sum()
    return loss


def plain_cosent(
    queries: Tensor,
    targets: Tensor,
    scores: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """`matryoshka_cosent` of one process over all pairs of pairs. The arguments are the same, and are not checked."""
    dims = queries.shape[1:] if dims is None else dims
    weights = (1.0,) * len(dims) if weights is None else weights
    loss = queries.new_zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        logits = (unit_rows(queries[:, :dim]) * unit_rows(targets[:, :dim])).sum(1) / temperature
        wrong = (logits[None, :] - logits[:, None])[scores[:, None] > scores[None, :]]
        loss = loss + weight * F.pad(wrong, (1, 0)).logsumexp(0)
    return loss


def plain_margin_mse(
    queries: Tensor,
    targets: Tensor,
    negatives: Tensor,
    scores: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """`matryoshka_margin_mse` of one process, of cosines. The arguments are the same, and are not checked."""
    dims = queries.shape[1:] if dims is None else dims
    weights = (1.0,) * len(dims) if weights is None else weights
    candidates = torch.cat([targets[:, None], negatives], 1)
    loss = queries.new_zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        logits = (unit_rows(queries[:, None, :dim]) * unit_rows(candidates[..., :dim])).sum(-1) / temperature
        ours, theirs = (rows[:, :1] - rows[:, 1:] for rows in (logits, scores))
        loss = loss + weight * F.mse_loss(ours, theirs)
    return loss


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their length; zero rows stay zero, and their gradient is 0 rather than 1 / eps."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    is_zero = norms <= SMALLEST_NORM
    unit: Tensor = rows / norms.masked_fill(is_zero, 1.0)
    return unit.masked_fill(is_zero, 0.0)


def _same_pair_or_id(size: int, query_ids: Tensor | None, target_ids: Tensor | None, device: torch.device) -> Tensor:
    """`[B, B]` bool: the pairs (i, j) that are not negatives of each other, the positives on the diagonal included."""
    same = torch.eye(size, dtype=torch.bool, device=device)
    for ids in (query_ids, target_ids):
        if ids is not None:
            same = same | (ids[:, None] == ids)
    return same
