"""CoSENT over Matryoshka prefixes: pairs with a grade, ranked by their cosines."""

from collections.abc import Sequence
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_losses.batch import Batch, Options, problem_with_call
from contrastive_losses.plain import unit_rows
from contrastive_losses.ranks import Gathered, Group, agree


def matryoshka_cosent(
    queries: Tensor,
    targets: Tensor,
    scores: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    group: Group | None = None,
) -> Tensor:
    """A loss for pairs with a grade, such as those of STS: the better one of two pairs should have the higher cosine
    (Su, 2022, https://kexue.fm/archives/8847; jina-embeddings-v3 trains its STS adapter by it, arXiv 2409.10173).

    With c_i the cosine of pair i over the temperature and s_i its score, one prefix gives

        log(1 + sum of exp(c_j - c_i) over all i, j with s_i > s_j).

    It knows an order only: scores may have any scale, and pairs with equal ones are not compared. Sorted by score, the
    sum is a running one, so time is O(B log B) and memory O(B * D).

    Args:
        queries: `[B, D]`, unnormalised: every prefix is normalised here.
        targets: `[B, D]`, row i to be compared with query i.
        scores: `[B]`, finite numbers, the more alike the higher; without gradient.
        temperature: above 0; 0.05 is sentence-transformers' `scale=20`. As for `matryoshka_info_nce`.
        dims, weights, group: as for `matryoshka_info_nce`, also what holds for gradients on several ranks. Here ranks
            exchange cosines and scores alone, and nothing in the backward pass.

    Returns:
        The loss, 0-d, float32, or float64 if any embeddings are; 0 if all scores are equal.

    Raises:
        ValueError: as for `matryoshka_info_nce`, and scores that do not fit.
    """
    batch = Batch(queries, targets, None, None, None, None)
    problem = problem_with_call(batch, Options(temperature, 0.0, dims, weights, None, None))
    problem = problem or _problem_with_scores(scores, queries)
    if problem is None:
        dims = tuple(queries.shape[-1:]) if dims is None else tuple(map(index, dims))
        weights = (1.0,) * len(dims) if weights is None else tuple(map(float, weights))
    tensors = [temperature] if isinstance(temperature, Tensor) else []
    number = None if tensors or problem else float(temperature)
    ranks = agree(batch, tensors, problem, ("cosent", dims, weights, number), False, group)
    assert dims is not None, "agree raises where the arguments do not fit"
    assert weights is not None

    dtype = torch.float64 if torch.float64 in (queries.dtype, targets.dtype) else torch.float32
    with torch.autocast(queries.device.type, enabled=False):
        pairs = [(unit_rows(queries[:, :d].to(dtype)) * unit_rows(targets[:, :d].to(dtype))).sum(1) for d in dims]
        order = ranks.gather(scores.detach().double()).sort(stable=True)
        # [P, B]; float64, because terms of a running sum over the whole batch are subtracted in the backward pass.
        cosines = Gathered.apply(torch.stack(pairs, 1).double(), ranks).T[:, order.indices]
        logits = cosines / (temperature.double() if isinstance(temperature, Tensor) else temperature)
        lower = torch.searchsorted(order.values, order.values)  # [B]: pairs with a lower score come before this place
        sums = F.pad(logits.logcumsumexp(1), (1, 0), value=-torch.inf)[:, lower]
        worse = (sums - logits).masked_fill(lower == 0, torch.finfo(torch.float64).min)
        losses = F.softplus(worse.logsumexp(1), threshold=50)
        return (losses * losses.new_tensor(weights)).sum().to(dtype)


def _problem_with_scores(scores: Tensor, queries: Tensor) -> str | None:
    if not isinstance(scores, Tensor) or scores.shape != queries.shape[:1]:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        return f"scores have shape {found}; expected one number for each pair: [{len(queries)}]"
    if scores.device != queries.device:
        return f"scores are on {scores.device} but queries on {queries.device}; move them to one device"
    if scores.is_complex() or (scores.device.type == "cpu" and not bool(scores.isfinite().all())):
        return "scores are not all finite real numbers; leave out the pairs that have none"
    return None
