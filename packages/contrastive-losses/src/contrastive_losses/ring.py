"""The exchange that keeps O(B / W) on each of W ranks: blocks of queries go round the ranks, one hop a step, instead of
being gathered.

A block holds what one rank's rows are to all columns: queries, norms, ids and the cosines of their pairs, in the
backward pass also weights and log sums. Each rank computes its columns against the block that it holds, while the block
is already on its way to the next rank. What is summed over columns, the rows' sums and the queries' gradients, travels
one step behind its block, to which each rank adds its part, and is at home after W hops. Sums have a fixed order. A
rank holds three blocks at most: the one in use, its copy that is being sent, and the one that arrives.

Bytes sent by each rank, with D numbers of e bytes in a query: the gather sends B·D·e forward and B·D·4 backward, the
ring B·D·e more backward, and 16·P·B in each pass for vectors of P prefixes.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_losses.ranks import Ranks, resized
from contrastive_losses.strip import Gradients, Needs, Strip, Sums, logit_dtype


def ring_sums(strip: Strip, ranks: Ranks, tiles: ModuleType, *, maxima: bool) -> Sums:
    """`strip_sums` of this rank's rows against all columns, and of its columns against all rows.

    Args:
        strip: this rank's rows against its own columns.
        tiles: the module that computes strips.
    """
    exp = strip.link == "exp"
    nothing = torch.full_like(strip.query_inverse_norm, -torch.inf if exp else 0.0)
    column, column_max = nothing.clone(), torch.full_like(nothing, -torch.inf)
    prefixes, longest = len(strip.dims), max(ranks.counts)
    carried = nothing.new_full((longest, 2 * prefixes), -torch.inf)  # sums and maxima of the block's rows
    carried[:, :prefixes] = -torch.inf if exp else 0.0
    for step, block in _Blocks(strip, ranks):
        count = len(block.queries)
        if count and len(strip.targets):
            part = tiles.strip_sums(_against(strip, block, own=step == 0), maxima=maxima)
            row, row_max = torch.split(carried[:count].T, prefixes)
            row.copy_(torch.logaddexp(row, part.row) if exp else row + part.row)
            column = torch.logaddexp(column, part.column) if exp else column
            if part.row_max is not None and part.column_max is not None:
                row_max.copy_(torch.maximum(row_max, part.row_max))
                column_max = torch.maximum(column_max, part.column_max)
        (carried,) = _passed([carried], ranks)()
    row, row_max = torch.split(carried[: ranks.own].T.contiguous(), prefixes)
    return Sums(row, column, row_max, column_max) if maxima else Sums(row, column, None, None)


def ring_gradients(
    strip: Strip,
    ranks: Ranks,
    tiles: ModuleType,
    row_weight: Tensor,
    row_log_sum: Tensor,
    column_weight: Tensor,
    column_log_sum: Tensor,
    reference: Tensor,
    needs: Needs,
) -> Gradients:
    """`strip_gradients`, of which `queries` and `row_moment` are this rank's rows against all columns, its columns' are
    against all rows, and `centred` and `total` are to be summed over ranks. Arguments are those of this rank's rows."""
    prefixes, longest, dtype = len(strip.dims), max(ranks.counts), logit_dtype(strip)
    carried = [row_weight.new_zeros(longest, prefixes)]
    if needs.queries:
        carried.append(strip.queries.new_zeros(longest, strip.queries.shape[1], dtype=dtype))
    of_targets = torch.zeros_like(strip.targets, dtype=dtype) if needs.targets else None
    of_negatives = torch.zeros_like(strip.negatives, dtype=dtype) if needs.negatives else None
    target_moment, negative_moment = map(torch.zeros_like, (strip.target_inverse_norm, strip.negative_inverse_norm))
    centred, total = torch.zeros_like(strip.scale), torch.zeros_like(strip.scale)
    for step, block in _Blocks(strip, ranks, row_weight, row_log_sum):
        count = len(block.queries)
        if count and len(strip.targets):
            against = _against(strip, block, own=step == 0)
            weight, log_sum = block.more
            part = tiles.strip_gradients(against, weight, log_sum, column_weight, column_log_sum, reference, needs)
            carried[0][:count] += part.row_moment.T
            for whole, of_part in (
                (carried[1][:count] if needs.queries else None, part.queries),
                (of_targets, part.targets),
                (of_negatives, part.negatives),
                (target_moment, part.target_moment),
                (negative_moment, part.negative_moment),
                (centred, part.centred),
                (total, part.total),
            ):
                if whole is not None:
                    whole += of_part
            del part
        carried = _passed(carried, ranks)()
    of_queries = carried[1][: ranks.own].contiguous() if needs.queries else None
    row_moment = carried[0][: ranks.own].T.contiguous()
    return Gradients(of_queries, of_targets, of_negatives, row_moment, target_moment, negative_moment, centred, total)


class _Block(NamedTuple):
    """One rank's rows. Vectors are `[P, b]` float64, ids `[b]` int64."""

    queries: Tensor  # [b, D]
    query_inverse_norm: Tensor
    positive: Tensor
    more: tuple[Tensor, ...]
    query_ids: Tensor | None
    target_ids: Tensor | None


class _Blocks:
    """(step, block) of each rank, from this one's backwards; the next is on its way while one is in use."""

    def __init__(self, strip: Strip, ranks: Ranks, *more: Tensor) -> None:
        self.strip, self.ranks, self.more = strip, ranks, more

    def __iter__(self) -> Iterator[tuple[int, _Block]]:
        strip, ranks, prefixes = self.strip, self.ranks, len(self.strip.dims)
        vectors = torch.cat([strip.query_inverse_norm, strip.positive, *self.more]).T
        ids = [each for each in (strip.query_ids, strip.target_ids) if each is not None]
        held = [resized(each, max(ranks.counts)) for each in (vectors, *ids, strip.queries)]
        for step in range(ranks.world_size):
            arriving = _passed(held, ranks) if step + 1 < ranks.world_size else None
            count = ranks.counts[(ranks.rank - step) % ranks.world_size]
            vectors, *ids, queries = (each[:count] for each in held)
            norm, positive, *more = torch.split(vectors.T.contiguous(), prefixes)
            rest = iter(ids)
            query_ids, target_ids = (None if of is None else next(rest) for of in (strip.query_ids, strip.target_ids))
            yield step, _Block(queries, norm, positive, tuple(more), query_ids, target_ids)
            if arriving is not None:
                held = arriving()


def _against(strip: Strip, block: _Block, *, own: bool) -> Strip:
    """A block's rows against this rank's columns, which belong to pairs behind those of the block, or are theirs."""
    if own:
        return strip

    def with_own(of_block: Tensor | None, of_strip: Tensor | None) -> Tensor | None:
        return None if of_block is None or of_strip is None else torch.cat([of_block, of_strip], -1)

    return strip._replace(
        first=len(block.queries),
        queries=block.queries,
        query_inverse_norm=block.query_inverse_norm,
        positive=torch.cat([block.positive, strip.positive], 1),
        query_ids=with_own(block.query_ids, strip.query_ids),
        target_ids=with_own(block.target_ids, strip.target_ids),
    )


def _passed(tensors: list[Tensor], ranks: Ranks) -> Callable[[], list[Tensor]]:
    """Sends tensors to the next rank, as one message; the result waits for those of the rank before, of equal shapes.
    `tensors` must not change until then."""
    assert ranks.group is not None
    message = torch.cat([each.contiguous().view(torch.uint8).flatten() for each in tensors])
    arriving = torch.empty_like(message)
    to, of = (dist.get_global_rank(ranks.group, (ranks.rank + hop) % ranks.world_size) for hop in (1, -1))
    send = dist.P2POp(dist.isend, message, to, ranks.group)
    receive = dist.P2POp(dist.irecv, arriving, of, ranks.group)
    works = dist.batch_isend_irecv([send, receive])

    def wait(_sent: Tensor = message) -> list[Tensor]:  # which has to live until it is
        for work in works:
            work.wait()
        parts = torch.split(arriving, [each.numel() * each.itemsize for each in tensors])
        return [part.view(each.dtype).view(each.shape) for part, each in zip(parts, tensors, strict=True)]

    return wait
