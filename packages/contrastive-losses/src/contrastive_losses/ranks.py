"""One loss over several ranks: agree on the shapes, then exchange as little as each rank's strip needs.

Each rank has its own targets and hard negatives and the queries of all ranks: hard negatives, if there are any most of
the data, are not exchanged. Sums over a column are then complete on the rank that owns it; sums over a row are added up
over ranks, and so are the gradients of the queries, which return to their owners.

Input gradients are W times the derivative of the loss, W being the number of ranks. The *mean* over ranks of a
parameter's gradients, which DDP and DeepSpeed take, is then the gradient of one process with the whole batch. A
temperature gets its full derivative on each rank; the mean of W equal numbers is correct.
"""

import zlib
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_losses.batch import Batch

Group = Any  # a torch.distributed.ProcessGroup; builds of torch without distributed lack the name

# What each rank sends first. What may differ between ranks …
OWN = ("unusable input", "rows", "queries need a gradient", "temperature or bias needs one", "anything needs one")
# … and what must not.
COMMON = (
    "the width D",
    "the number of hard negatives K (-1: none given)",
    "query_ids (1: given)",
    "target_ids (1: given)",
    "sample_weights (1: given)",
    "return_stats",
    "torch.is_grad_enabled()",
    "the dtypes and devices of the inputs (checksum)",
    "the loss, dims and their weights, margin, precision, exchange, temperature or bias given as a number, or which "
    "ids are made (checksum)",
)


class Ranks:
    """The ranks of a group, how many rows each has, and the exchanges between them. Without a group, this process.

    Attributes:
        counts: rows of each rank.
        rank: this one's number in the group.
        first: the number of this rank's first row in the whole batch.
        queries_need_gradient, scalars_need_gradient, any_needs_gradient: whether so on any rank; then all ranks take
            part in the exchange of gradients.
    """

    def __init__(self, group: Group | None, told: list[list[int]], rank: int) -> None:
        self.group, self.rank = group, rank
        self.counts = [row[1] for row in told]
        self.first, self.own = sum(self.counts[:rank]), self.counts[rank]
        self.queries_need_gradient, self.scalars_need_gradient, self.any_needs_gradient = (
            any(row[i] for row in told) for i in (2, 3, 4)
        )

    @property
    def world_size(self) -> int:
        return len(self.counts)

    def gather(self, rows: Tensor) -> Tensor:
        """[b, …] on each rank -> [B, …] on every rank, in rank order."""
        if self.world_size == 1:
            return rows
        longest = max(self.counts)
        padded = rows if len(rows) == longest else resized(rows, longest)  # one shape on all ranks
        gathered = rows.new_empty(self.world_size * longest, *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, padded.contiguous(), group=self.group)
        if min(self.counts) == longest:
            return gathered
        return torch.cat(
            [piece[:count] for piece, count in zip(torch.split(gathered, longest), self.counts, strict=True)]
        )

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """[B, …] on each rank -> [b, …]: this rank's rows, added up over ranks."""
        if self.world_size == 1:
            return rows
        longest = max(self.counts)
        if min(self.counts) < longest:
            rows = torch.cat([resized(piece, longest) for piece in torch.split(rows, self.counts)])
        own = rows.new_empty(longest, *rows.shape[1:])
        dist.reduce_scatter_tensor(own, rows, group=self.group)
        return own[: self.own]

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.SUM) if self.world_size > 1 else values

    def max(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.MAX) if self.world_size > 1 else values

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """The log of the sum over ranks of exp(values), elementwise."""
        if self.world_size == 1:
            return values
        shift = self.max(values).clamp_min_(torch.finfo(values.dtype).min)  # -inf - -inf would be nan
        return shift + self.sum((values - shift).exp_()).log_()

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, how, group=self.group)
        return values


class Gathered(torch.autograd.Function):
    """`Ranks.gather`, whose gradient is W times that of this rank's rows: each rank has the whole loss's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(rows)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks
        return upstream[ranks.first : ranks.first + ranks.own] * ranks.world_size, None


def resized(rows: Tensor, length: int) -> Tensor:
    resized = rows.new_zeros(length, *rows.shape[1:])
    resized[: len(rows)] = rows
    return resized


def agree(
    batch: Batch,
    scalars: list[Tensor],
    problem: str | None,
    settings: tuple[Any, ...],
    stats: bool,
    group: Group | None,
) -> Ranks:
    """The ranks of `group`, after all of them found their input usable and equal in everything but rows.

    Args:
        scalars: those of temperature and bias that are tensors.
        problem: what is wrong with this rank's input, if anything. It is raised after the exchange, because the others
            would wait for a rank that leaves early. (Nowhere else in a loss does the host wait for the device.)
        settings: must be equal on all ranks.

    Raises:
        ValueError: on every rank, if any rank has a problem, the ranks disagree, or no rank has a row.
    """
    if group is None:
        if problem is not None:
            raise ValueError(problem)
        if len(batch.queries) == 0:
            raise ValueError("the batch has no rows; expected at least one pair")
        return Ranks(None, [_description(batch, scalars, settings, stats)], 0)

    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of `group`; call the loss only on the ranks that are")
    mine = [1] + [0] * (len(OWN + COMMON) - 1) if problem is not None else _description(batch, scalars, settings, stats)
    told = _exchanged(mine, group)
    if problem is not None:
        raise ValueError(problem)
    unusable = [rank for rank, row in enumerate(told) if row[0]]
    if unusable:
        raise ValueError(
            f"rank(s) {unusable} of the group were given unusable input; their own messages say what is wrong"
        )
    for name, *values in zip(COMMON, *(row[len(OWN) :] for row in told), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of the group differ in {name}: {values}, from rank 0 on; "
                "give every rank the same (only the number of rows may differ)"
            )
    ranks = Ranks(group, told, rank)
    if sum(ranks.counts) == 0:
        raise ValueError("no rank has a row; expected at least one pair in the whole batch")
    return ranks


def refuse(problem: str, group: Group | None) -> NoReturn:
    """Raises ValueError for a problem found before there is a batch, on every rank of the group: the others are, or
    will be, in `agree`."""
    nothing: Any = (None,) * len(Batch._fields)
    agree(Batch(*nothing), [], problem, (), False, group)
    raise AssertionError("agree raises where there is a problem")


def _exchanged(numbers: list[int], group: Group) -> list[list[int]]:
    """Every rank's numbers, in rank order; over the CPU, unless the group has NCCL only, whatever the inputs are on."""
    backend = dist.get_backend(group)
    device = "cuda" if "nccl" in backend and "gloo" not in backend else "cpu"
    message = torch.tensor(numbers, dtype=torch.int64, device=device)
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(messages, message, group=group)
    told: list[list[int]] = torch.stack(messages).tolist()
    return told


def _description(batch: Batch, scalars: list[Tensor], settings: tuple[Any, ...], stats: bool) -> list[int]:
    """The numbers of OWN and COMMON, in their order."""
    grad = torch.is_grad_enabled()
    scalars_need = grad and any(scalar.requires_grad for scalar in scalars)
    inputs = (batch.queries, batch.targets, batch.negatives)
    dtypes = [(rows.dtype, rows.device.type) for rows in batch if rows is not None]
    return [
        0,
        len(batch.queries),
        int(grad and batch.queries.requires_grad),
        int(scalars_need),
        int(scalars_need or (grad and any(rows is not None and rows.requires_grad for rows in inputs))),
        batch.queries.shape[1],
        -1 if batch.negatives is None else batch.negatives.shape[1],
        int(batch.query_ids is not None),
        int(batch.target_ids is not None),
        int(batch.sample_weights is not None),
        int(stats),
        int(grad),
        zlib.crc32(repr(dtypes).encode()),
        zlib.crc32(repr(settings).encode()),
    ]
