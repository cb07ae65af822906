"""Margin-MSE over Matryoshka prefixes: a teacher's scores say by how much a target should beat its hard negatives."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from contrastive_losses.batch import Batch, Options, problem_with_call
from contrastive_losses.plain import unit_rows
from contrastive_losses.ranks import Gathered, Group, agree


def matryoshka_margin_mse(
    queries: Tensor,
    targets: Tensor,
    negatives: Tensor,
    scores: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    normalize: bool = True,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    group: Group | None = None,
) -> Tensor:
    """The squared error of margins between a target and its hard negatives, against those of a teacher, such as a
    cross-encoder (Hofstätter et al., 2020, arXiv 2010.02666).

    With l(a, b) the cosine of two prefixes over the temperature and s the teacher's scores, one prefix gives the mean
    over all i and k of

        (l(q_i, t_i) - l(q_i, n_ik) - (s_i0 - s_ik))^2.

    No query meets the negatives of another: the teacher has not read them together.

    Args:
        queries: `[B, D]`, unnormalised: every prefix is normalised here, unless `normalize` is false.
        targets: `[B, D]`.
        negatives: `[B, K, D]`, the K hard negatives of each query, K at least 1.
        scores: `[B, 1 + K]`, finite: the teacher's score of each query with its target, then with each of its
            negatives; without gradient. Of margins m alone, `[B, K]`: 0 and -m.
        temperature: above 0, divides our cosines, whose margins are at most 2, to the scale of the scores. As for
            `matryoshka_info_nce`; one that learns finds that scale.
        normalize: false takes products in the place of cosines, as the paper and sentence-transformers'
            `MarginMSELoss` do; with a temperature of 1 it is their loss.
        dims, weights, group: as for `matryoshka_info_nce`, also what holds for gradients on several ranks. Here ranks
            exchange margins and scores alone, and nothing in the backward pass.

    Returns:
        The loss, 0-d, float32, or float64 if any embeddings are.

    Raises:
        ValueError: as for `matryoshka_info_nce`, and scores that do not fit.
    """
    batch = Batch(queries, targets, negatives, None, None, None)
    problem = problem_with_call(batch, Options(temperature, 0.0, dims, weights, None, None))
    problem = problem or _problem_with_scores(scores, negatives)
    if problem is None:
        dims = tuple(queries.shape[-1:]) if dims is None else tuple(map(index, dims))
        weights = (1.0,) * len(dims) if weights is None else tuple(map(float, weights))
    tensors = [temperature] if isinstance(temperature, Tensor) else []
    number = None if tensors or problem else float(temperature)
    ranks = agree(batch, tensors, problem, ("margin-mse", bool(normalize), dims, weights, number), False, group)
    assert dims is not None, "agree raises where the arguments do not fit"
    assert weights is not None

    embeddings = queries, targets, negatives
    dtype = torch.float64 if torch.float64 in [rows.dtype for rows in embeddings] else torch.float32
    with torch.autocast(queries.device.type, enabled=False):
        prepared = unit_rows if normalize else torch.Tensor.contiguous
        margins = []
        for dim in dims:
            query, target, hard = (prepared(rows[..., :dim].to(dtype)) for rows in embeddings)
            margins.append((query * target).sum(-1, keepdim=True) - (hard @ query[:, :, None]).squeeze(-1))
        wanted = scores.detach().double()
        wanted = ranks.gather(wanted[:, :1] - wanted[:, 1:])
        ours: Tensor = Gathered.apply(torch.stack(margins, 1).double(), ranks)  # [B, P, K]
        ours = ours / (temperature.double() if isinstance(temperature, Tensor) else temperature)
        losses = (ours - wanted[:, None]).square().mean((0, 2))
        return (losses * losses.new_tensor(weights)).sum().to(dtype)


def _problem_with_scores(scores: Tensor, negatives: Tensor | None) -> str | None:
    if not isinstance(negatives, Tensor) or not negatives.shape[1]:
        return "there are no negatives; expected [B, K, D] with the K hard negatives of each query, K at least 1"
    rows, count = negatives.shape[:2]
    if not isinstance(scores, Tensor) or scores.shape != (rows, 1 + count):
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        return (
            f"scores have shape {found}; expected one of each query with its target and with each of its {count} "
            f"negatives: [{rows}, {1 + count}]"
        )
    if scores.device != negatives.device:
        return f"scores are on {scores.device} but negatives on {negatives.device}; move them to one device"
    if scores.is_complex() or (scores.device.type == "cpu" and not bool(scores.isfinite().all())):
        return "scores are not all finite real numbers; leave out the triplets that have none"
    return None
