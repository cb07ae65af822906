"""One loss over several ranks: agree on the shapes, then gather every rank's rows once.

Every rank computes the loss of the whole batch from the gathered rows, so no gradient has to travel: what a rank needs
for its own rows stands in its own backward pass. Multiplied by the number of ranks W, it makes the *mean* over ranks of
a parameter's gradients, which is what DDP and DeepSpeed take, the gradient of one process that holds the whole batch. A
temperature is not gathered: each rank has its full derivative, and the mean of W equal numbers is right as it is.
"""

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_losses.batch import Batch

Group = Any  # a torch.distributed.ProcessGroup; builds of torch without distributed lack the name


# What each rank tells the others before the gather. All but the first two must be the same everywhere.
DESCRIBED = (
    "unusable input",
    "rows",
    "the width D",
    "the number of hard negatives K (-1: none given)",
    "query_ids (1: given)",
    "target_ids (1: given)",
    "sample_weights (1: given)",
    "the dtypes of the inputs (checksum)",
    "dims and their weights (checksum)",
)


class _GatherRows(torch.autograd.Function):
    """[b, …] on each rank -> [sum of b, …] on every rank, in rank order. Backward: W times the own slice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Group) -> Tensor:
        rank = dist.get_rank(group)
        ctx.world_size, ctx.start, ctx.count = len(counts), sum(counts[:rank]), counts[rank]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # all_gather wants one shape everywhere
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.world_size * grad.narrow(0, ctx.start, ctx.count), None, None


def gather_batch(batch: Batch, problem: str | None, settings: tuple, group: Group) -> Batch:
    """The batch of all ranks of `group`, rows in rank order, with the gradients described above.

    `problem` is what this rank found wrong with its own input, if anything: it is raised only after every rank has
    heard of it, because a rank that leaves early would leave the others waiting. `settings` must be equal on all ranks.

    Raises:
        ValueError: on every rank, if any rank has a problem, the ranks disagree, or no rank has a row.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of `group`; call the loss only on the ranks that are")
    counts = _agree(batch, problem, settings, group)

    def gathered(rows: Tensor) -> Tensor:
        return _GatherRows.apply(rows, counts, group)

    queries, targets, negatives, query_ids, target_ids, sample_weights = batch
    # One message holds all embeddings: pair i becomes [query i, target i, its K negatives], in their common dtype.
    embeddings = [queries[:, None], targets[:, None]] + ([] if negatives is None else [negatives])
    packed = gathered(torch.cat(embeddings, dim=1))
    return Batch(
        queries=packed[:, 0],
        targets=packed[:, 1],
        negatives=None if negatives is None else packed[:, 2:],
        query_ids=None if query_ids is None else gathered(query_ids),
        target_ids=None if target_ids is None else gathered(target_ids),
        sample_weights=None if sample_weights is None else gathered(sample_weights),
    )


def _agree(batch: Batch, problem: str | None, settings: tuple, group: Group) -> list[int]:
    """Each rank's number of rows, after one small exchange: the only point at which the host waits for the device."""
    mine = [1] + [0] * (len(DESCRIBED) - 1) if problem is not None else _description(batch, settings)
    message = torch.tensor(mine, dtype=torch.int64, device=batch.queries.device)
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(messages, message, group=group)
    unusable, rows, *must_be_equal = torch.stack(messages).T.tolist()  # for each thing described, one number per rank

    if problem is not None:
        raise ValueError(problem)
    if any(unusable):
        ranks = [rank for rank, flag in enumerate(unusable) if flag]
        raise ValueError(
            f"rank(s) {ranks} of the group were given unusable input; their own messages say what is wrong"
        )
    for name, values in zip(DESCRIBED[2:], must_be_equal, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of the group differ in {name}: {values}, from rank 0 on; "
                "give every rank the same (only the number of rows may differ)"
            )
    if sum(rows) == 0:
        raise ValueError("no rank has a row; expected at least one pair in the whole batch")
    return rows


def _description(batch: Batch, settings: tuple) -> list[int]:
    dtypes = [rows.dtype for rows in batch if rows is not None]
    return [
        0,
        len(batch.queries),
        batch.queries.shape[1],
        -1 if batch.negatives is None else batch.negatives.shape[1],
        int(batch.query_ids is not None),
        int(batch.target_ids is not None),
        int(batch.sample_weights is not None),
        zlib.crc32(repr(dtypes).encode()),
        zlib.crc32(repr(settings).encode()),
    ]
