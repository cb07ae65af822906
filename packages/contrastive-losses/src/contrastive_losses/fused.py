"""A loss over pairs as one differentiable function with O(B·D) memory: the strip's sums in the forward pass, its
gradients in the backward pass, and vectors of O(B) float64 numbers between them.

With o_i the sum of exp(logit) over the negatives of row i, relative to its positive, InfoNCE is log1p(o_i) and its
derivative by the positive's logit is -o_i / (1 + o_i). Both stay exact if o_i is tiny, where a cross entropy subtracts
two nearly equal numbers.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from operator import index
from types import ModuleType
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_losses import torch_tiles
from contrastive_losses.batch import SMALLEST_NORM, Batch, Exchange, Options, problem_with_call
from contrastive_losses.precision import Precision, products_in, rounded
from contrastive_losses.ranks import Group, Ranks, agree
from contrastive_losses.ring import ring_gradients, ring_sums
from contrastive_losses.stats import LossStats, stats_of, weighted_sums
from contrastive_losses.strip import LOG2E, Needs, Strip, Sums, blocks, logit_dtype


def tiles_for(strip: Strip) -> ModuleType:
    """The module that computes this strip: the only choice by device."""
    if strip.queries.is_cuda and find_spec("triton") is not None:
        from contrastive_losses import triton_tiles
        from contrastive_losses.triton_check import kernels_are_right

        precision = torch.backends.cuda.matmul.fp32_precision
        if triton_tiles.supports(strip) and kernels_are_right(strip.queries.device, strip.queries.dtype, precision):
            return triton_tiles
    return torch_tiles


_NOT_TRANSFORMED = (
    "torch.func (grad, vmap, jacrev, …) and forward-mode differentiation do not reach into this loss; plain_info_nce "
    "and plain_sigmoid in contrastive_losses.plain are the same losses by ordinary operations, into which they do. For "
    "a plain gradient of this one, use backward() or torch.autograd.grad"
)


GATHERED_BYTES = 4 * 2**30
"""Up to this size "auto" gathers the queries and their gradients: one message is faster than W."""


class Settings(NamedTuple):
    """A loss without its tensors."""

    link: Literal["exp", "sigmoid"]
    dims: tuple[int, ...]  # [P] ascending, distinct
    weights: tuple[float, ...]  # [P]
    margin: float | None
    stats: bool
    precision: Precision | None
    ring: bool


class Call(NamedTuple):
    """A call of the loss: what of it has no gradient."""

    batch: Batch
    settings: Settings
    ranks: Ranks


def pair_loss(
    link: Literal["exp", "sigmoid"],
    batch: Batch,
    options: Options,
    *,
    group: Group | None,
    return_stats: bool,
    shared: tuple[Any, ...] = (),
) -> Tensor | tuple[Tensor, LossStats]:
    """Checks, agrees with the other ranks, and computes. `matryoshka_info_nce` describes the arguments; `shared` must
    be equal on all ranks too."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_NOT_TRANSFORMED)
    temperature, bias, dims, weights, margin, precision, exchange = options
    problem = problem_with_call(batch, options)
    if problem is None:
        dims = tuple(batch.queries.shape[-1:]) if dims is None else tuple(map(index, dims))
        weights = (1.0,) * len(dims) if weights is None else tuple(float(weight) for weight in weights)
    scalars = [scalar for scalar in (temperature, bias) if isinstance(scalar, Tensor)]
    numbers = (
        [None if isinstance(scalar, Tensor) else float(scalar) for scalar in (temperature, bias)] if not problem else []
    )
    told = (link, dims, weights, margin, precision, exchange, *numbers, *shared)
    ranks = agree(batch, scalars, problem, told, return_stats, group)
    assert isinstance(dims, tuple), "agree raises where the arguments do not fit"
    assert isinstance(weights, tuple)

    queries, targets, negatives, *_ = batch
    distinct = tuple(sorted(set(dims)))
    sums = [sum(weight for each, weight in zip(dims, weights, strict=True) if each == dim) for dim in distinct]
    number = rounded(queries[:0], precision).itemsize + max(4, queries.itemsize)
    ring = goes_round(exchange, ranks.world_size, sum(ranks.counts), queries.shape[1], number)
    settings = Settings(link, distinct, tuple(sums), margin, return_stats, precision, ring)
    scale, bias = _scalar(temperature, queries.device).reciprocal(), _scalar(bias, queries.device)
    # A rank whose inputs need no gradient must take part in the backward pass of the others.
    anchor = torch.zeros((), device=queries.device, requires_grad=ranks.any_needs_gradient)
    with torch.autocast(queries.device.type, enabled=False):
        applied: tuple[Tensor, Tensor] = _PairLoss.apply(
            queries, targets, negatives, scale, bias, anchor, Call(batch, settings, ranks)
        )
    loss, stats = applied
    if not return_stats:
        return loss
    return loss, stats_of(stats, dims, [distinct.index(dim) for dim in dims], loss.dtype)


def goes_round(exchange: Exchange, ranks: int, pairs: int, width: int, number: int) -> bool:
    """Whether queries are passed round and not gathered; `number`: bytes of one of a query's, with its gradient."""
    return ranks > 1 and (exchange == "ring" or (exchange == "auto" and pairs * width * number > GATHERED_BYTES))


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """0-d float64 on the device, with the gradient that it has."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        anchor: Tensor,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        batch, settings, ranks = call
        ctx.dtypes = tuple(None if rows is None else rows.dtype for rows in (queries, targets, negatives))
        strip, rounding = _strip(queries, targets, negatives, scale, bias, call)
        own, dtype = slice(strip.first, strip.first + ranks.own), logit_dtype(strip)
        sample_weights = _normalised_weights(batch.sample_weights, ranks, strip.positive, settings.ring)
        of_dims = torch.tensor(settings.weights, dtype=torch.float64, device="cpu")[:, None]
        weights = of_dims.to(sample_weights.device, non_blocking=True) * sample_weights  # [P, B], of a ring [P, n]

        with products_in(settings.precision, strip.queries.device):
            row, column, row_max, column_max = _sums(strip, settings, ranks)
        for_rows, for_columns = _positive_logits(strip, rounding, row, column, sum(ranks.counts))
        if strip.link == "exp":
            losses = F.softplus((row - for_rows)[:, own], threshold=50) + F.softplus(column - for_columns, threshold=50)
        else:
            losses = row[:, own] + F.softplus(-(for_rows + bias)[:, own], threshold=50)
        norms = torch.cat([strip.query_inverse_norm[:, own], strip.target_inverse_norm, strip.negative_inverse_norm], 1)
        result = torch.cat([(weights[:, own] * losses).sum()[None], (norms == 0).double().sum(1)])
        if row_max is not None and column_max is not None:
            stats = weighted_sums(strip.positive[:, own], row_max[:, own], column_max, sample_weights[own], dtype)
            result = torch.cat([result, stats.flatten()])
        loss, zeros, stats = ranks.sum(result).tensor_split((1, 1 + len(strip.dims)))
        loss, stats = loss[0].to(dtype), stats.view(-1, len(strip.dims))
        # The derivatives by all logits of a prefix add up to 0, so for the derivative by the scale any number may be
        # subtracted from the cosines, which leaves small terms in a collapsed batch. Tiles cannot with a zero prefix.
        reference = torch.zeros_like(zeros)
        if strip.link == "exp":
            mean = ranks.sum(strip.positive.sum(1)) / sum(ranks.counts) if settings.ring else strip.positive.mean(1)
            reference = mean.masked_fill(zeros > 0, 0.0)

        ctx.fixed, tensors = strip[:4], strip[4:]  # what is no tensor stands first
        ctx.save_for_backward(*tensors, rounding, reference, weights, row, column)
        ctx.ranks, ctx.settings = ranks, settings
        ctx.negatives_shape = None if negatives is None else negatives.shape
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(_NOT_TRANSFORMED)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the graph would silently lack this loss
            raise RuntimeError("no gradients of gradients here; the forms in contrastive_losses.plain have them")
        *tensors, rounding, reference, weights, row, column = ctx.saved_tensors
        strip, ranks, settings = Strip(*ctx.fixed, *tensors), ctx.ranks, ctx.settings
        need_targets, need_negatives, need_scale, need_bias = ctx.needs_input_grad[1:5]
        needs = Needs(ranks.queries_need_gradient, need_targets, need_negatives, ranks.scalars_need_gradient)
        own = slice(strip.first, strip.first + ranks.own)
        with torch.autocast(strip.queries.device.type, enabled=False):
            weights = weights * upstream.double()
            for_rows, for_columns = _positive_logits(strip, rounding, row, column, sum(ranks.counts))
            row_log_sum, column_log_sum = torch.logaddexp(for_rows, row), torch.logaddexp(for_columns, column)
            vectors = weights, row_log_sum, weights[:, own], column_log_sum, reference
            with products_in(settings.precision, strip.queries.device):
                if settings.ring:
                    given = ring_gradients(strip, ranks, tiles_for(strip), *vectors, needs)
                else:
                    given = tiles_for(strip).strip_gradients(strip, *vectors, needs)
            for_rows, row = for_rows[:, own], row[:, own]
            if strip.link == "exp":
                shares = (row - for_rows).sigmoid(), (column - for_columns).sigmoid()  # o / (1 + o)
            else:
                shares = (-(for_rows + strip.bias)).sigmoid(), torch.zeros_like(for_columns)
            from_row, from_column = (-weights[:, own] * share for share in shares)
            of_positive, moment = from_row + from_column, from_row * for_rows + from_column * for_columns
            centred = given.centred + (moment - of_positive * strip.scale * reference[:, None]).sum()
            given.row_moment[:, own] += moment
            scalars = torch.stack([centred / strip.scale, given.total + of_positive.sum()])
            if settings.ring:
                summed, row_moment = ranks.sum(scalars), given.row_moment
            else:
                summed = ranks.sum(torch.cat([scalars, given.row_moment.flatten()]))
                row_moment = summed[2:].view_as(given.row_moment)[:, own]
            of_scale, of_bias = summed[0] if need_scale else None, summed[1] if need_bias else None

            raw_positive = of_positive * strip.scale * strip.query_inverse_norm[:, own] * strip.target_inverse_norm
            queries, targets, negatives = strip.queries[own], strip.targets, strip.negatives
            of_queries, of_targets, of_negatives = given[:3]
            # What the products lack: first the positive, which in a collapsed batch cancels most of them, so that the
            # rest is rounded at its own size; then the norms, since a move along a prefix does not change its cosines.
            if of_queries is not None:
                of_queries = of_queries if settings.ring else ranks.scatter_sum(of_queries)
                along = -row_moment * strip.query_inverse_norm[:, own].square()
                _add_rows(of_queries, targets, raw_positive, strip.dims)
                _add_rows(of_queries, queries, along, strip.dims)
                of_queries = of_queries.mul_(ranks.world_size).to(ctx.dtypes[0])
            if of_targets is not None:
                along = -(given.target_moment + moment) * strip.target_inverse_norm.square()
                _add_rows(of_targets, queries, raw_positive, strip.dims)
                _add_rows(of_targets, targets, along, strip.dims)
                of_targets = of_targets.mul_(ranks.world_size).to(ctx.dtypes[1])
            if of_negatives is not None:
                along = -given.negative_moment * strip.negative_inverse_norm.square()
                _add_rows(of_negatives, negatives, along, strip.dims)
                of_negatives = of_negatives.mul_(ranks.world_size).to(ctx.dtypes[2]).view(ctx.negatives_shape)
        return of_queries, of_targets, of_negatives, of_scale, of_bias, None, None


def _strip(
    queries: Tensor, targets: Tensor, negatives: Tensor | None, scale: Tensor, bias: Tensor, call: Call
) -> tuple[Strip, Tensor]:
    """This rank's strip, in a ring of its own rows alone, and the `rounding` of `_positive_logits`."""
    batch, settings, ranks = call
    gather: Callable[[Tensor], Tensor] = (lambda rows: rows) if settings.ring else ranks.gather
    dims = settings.dims
    queries, targets = rounded(queries, settings.precision), rounded(targets, settings.precision)
    flat = targets[:0] if negatives is None else rounded(negatives.flatten(0, 1), settings.precision)
    query_inverse_norm, target_inverse_norm, negative_inverse_norm = (
        _inverse_norms(rows, dims) for rows in (queries, targets, flat)
    )
    positive = _prefix_products(queries, targets, dims) * query_inverse_norm * target_inverse_norm
    of_pairs = torch.cat([query_inverse_norm, target_inverse_norm, positive])
    query_inverse_norm, own_inverse_norm, positive = gather(of_pairs.T).T.contiguous().chunk(3)
    strip = Strip(
        link=settings.link,
        dims=dims,
        margin=settings.margin,
        first=0 if settings.ring else ranks.first,
        queries=gather(queries),
        targets=targets,
        negatives=flat,
        query_inverse_norm=query_inverse_norm,
        target_inverse_norm=target_inverse_norm,
        negative_inverse_norm=negative_inverse_norm,
        scale=scale,
        bias=bias,
        query_ids=None if batch.query_ids is None else gather(batch.query_ids),
        target_ids=None if batch.target_ids is None else gather(batch.target_ids),
        positive=positive,
    )
    return strip, _rounding(query_inverse_norm * LOG2E * scale, strip) + _rounding(own_inverse_norm, strip)


def _sums(strip: Strip, settings: Settings, ranks: Ranks) -> Sums:
    """Sums and maxima over all columns for the strip's rows, over all rows for its columns."""
    if settings.ring:
        return ring_sums(strip, ranks, tiles_for(strip), maxima=settings.stats)
    sums = tiles_for(strip).strip_sums(strip, maxima=settings.stats)
    row = ranks.log_sum_exp(sums.row) if strip.link == "exp" else ranks.sum(sums.row)
    return Sums(row, sums.column, None if sums.row_max is None else ranks.max(sums.row_max), sums.column_max)


def _rounding(factors: Tensor, strip: Strip) -> Tensor:
    """The relative errors of factors in the dtype of the logits."""
    return torch.where(factors == 0, 0.0, factors.to(logit_dtype(strip)) / factors - 1)


def _positive_logits(strip: Strip, rounding: Tensor, row: Tensor, column: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """The logits of the pairs, for their rows `[P, B]` and for their columns `[P, n]`: exact except for an error that
    they should share with the negatives.

    Tiles multiply by rounded factors, which scales all logits of a row, and of a column, alike. If the negatives are as
    close as the positive, only the difference counts, and the positive must move with them; if they are far below, it
    must not. So it moves as a typical negative does, whose logit is the log sum minus the logarithm of the number of
    negatives: exactly so if all are equal, and within that logarithm in any case.
    """
    logit = strip.scale * strip.positive
    own = slice(strip.first, strip.first + len(strip.targets))
    if strip.link == "sigmoid":
        return logit, logit[:, own]
    few = math.log(pairs)
    for_rows, for_columns = ((log_sum - few).clamp(-strip.scale, strip.scale) for log_sum in (row, column))
    return logit + rounding * for_rows, logit[:, own] + rounding[:, own] * for_columns


def _normalised_weights(sample_weights: Tensor | None, ranks: Ranks, like: Tensor, ring: bool) -> Tensor:
    """`[B]` float64 for all ranks' rows, of a ring for this one's; those of all ranks sum to 1 (or are all 0)."""
    if sample_weights is None:
        return like.new_full(like.shape[1:], 1.0 / sum(ranks.counts))
    weights = sample_weights.detach().double()
    weights = weights if ring else ranks.gather(weights)
    total = ranks.sum(weights.sum()) if ring else weights.sum()
    return weights / total.clamp_min(torch.finfo(torch.float64).tiny)


def _row_panels(rows: Tensor) -> list[slice]:
    """Few rows at a time on a CPU, so that copies in another dtype are small beside the embeddings."""
    step = 512 if rows.device.type == "cpu" else 8192
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _prefix_products(left: Tensor, right: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`[P, n]` float64: <left[i, :d], right[i, :d]> for each of dims."""
    products = left.new_empty(len(dims), len(left), dtype=torch.float64)
    for rows in _row_panels(left):
        product = left[rows].double() * right[rows].double()
        for p, block in enumerate(blocks(dims)):
            products[p, rows] = product[:, block].sum(1)
    return products.cumsum_(0)


def _inverse_norms(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`[P, n]` float64, 0 for prefixes that count as zero."""
    norms = _prefix_products(rows, rows, dims).sqrt_()
    return torch.where(norms <= SMALLEST_NORM, 0.0, norms.reciprocal())


def _add_rows(gradient: Tensor, rows: Tensor, of_prefixes: Tensor, dims: tuple[int, ...]) -> None:
    """gradient[i, :d] += of_prefixes[p, i] * rows[i, :d] for each dim d, in place."""
    # For each block of columns the sum over the prefixes that contain it.
    factors = of_prefixes.flip(0).cumsum(0).flip(0).to(gradient.dtype)
    for panel in _row_panels(rows):
        embeddings = rows[panel].to(gradient.dtype)
        for factor, block in zip(factors, blocks(dims), strict=True):
            gradient[panel, block].addcmul_(embeddings[:, block], factor[panel, None])
