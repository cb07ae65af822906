"""Texts of different lengths laid end to end, so that no padding token is computed."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Batch = TypeVar("_Batch")


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """N token sequences in one tensor.

    Args:
        ids: int64 `[T]`, the sequences one after another, special tokens included.
        cu_seqlens: int32 `[N + 1]`, where each sequence starts, then T.
        max_seqlen: length of the longest sequence.

    Raises:
        ValueError: tensors that do not fit together, or an empty sequence (which has no mean).

    Tensors on an accelerator are read back once to be checked; build on the CPU and use `.to(device)` instead.
    """

    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def __post_init__(self) -> None:
        for name, dtype in (("ids", torch.int64), ("cu_seqlens", torch.int32)):
            tensor = getattr(self, name)
            if tensor.dim() != 1 or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; expected {dtype}, one dimension"
                )
        bounds = self.cu_seqlens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(self.ids):
            raise ValueError(
                f"cu_seqlens is {_short(bounds)} for {len(self.ids)} ids; "
                "expected it to start with 0, end with the number of ids, and hold at least one sequence"
            )
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        for i, length in enumerate(lengths):
            if length < 1:
                raise ValueError(
                    f"sequence {i} has {length} tokens; expected at least one (an empty text has <s> </s>)"
                )
        if max(lengths) != self.max_seqlen:
            raise ValueError(f"max_seqlen is {self.max_seqlen}, but the longest sequence has {max(lengths)} tokens")
        # Kept on the host: the tower plans its work from the lengths and must not wait for the device.
        object.__setattr__(self, "lengths", tuple(lengths))

    lengths: tuple[int, ...] = ()  # of each sequence; filled in by the checks above

    @classmethod
    def from_lists(cls, sequences: Sequence[Sequence[int]]) -> PackedTokens:
        """Packs lists of token ids, such as a `Tokenizer` returns.

        Raises:
            ValueError: no sequence, or an empty one.
        """
        if not len(sequences):
            raise ValueError("there is no sequence to pack; expected at least one")
        ends = [0]
        for sequence in sequences:
            ends.append(ends[-1] + len(sequence))
        ids = torch.tensor([i for sequence in sequences for i in sequence], dtype=torch.int64, device="cpu")
        return cls(ids, torch.tensor(ends, dtype=torch.int32, device="cpu"), max(map(len, sequences)))

    def __len__(self) -> int:
        """N, the number of sequences."""
        return len(self.lengths)

    def by_length(self) -> tuple[PackedTokens, Tensor]:
        """The sequences from the shortest to the longest, and int64 `[N]`, their indexes in this batch."""
        layout = ByLength.of(self)
        return PackedTokens(self.ids[layout.tokens], layout.cu_seqlens, self.max_seqlen), layout.order

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        """The same tokens on another device."""
        return on_device(self, device, non_blocking)


@dataclass(frozen=True, eq=False)
class ByLength:
    """A packed batch sorted by length: sequences of one length form a plain `[n, L]` block.

    Attributes:
        groups: (L, n) by ascending L: n sequences of L tokens.
        tokens: int64 `[T]`, where each token was in the batch as given.
        positions: int64 `[T]`, each token's position in its sequence.
        rows: int64 `[T]`, each token's sequence in the batch as given.
        counts: int64 `[N]`, the length of each sequence in the batch as given.
        order: int64 `[N]`, the sequences' indexes in the batch as given.
        cu_seqlens: int32 `[N + 1]`, where each sequence starts in this order, then T.
        max_seqlen: length of the longest sequence.
    """

    groups: tuple[tuple[int, int], ...]
    tokens: Tensor
    positions: Tensor
    rows: Tensor
    counts: Tensor
    order: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, packed: PackedTokens) -> ByLength:
        """Plans on the host, then moves the indexes to where the ids are."""
        lengths = torch.tensor(packed.lengths, device="cpu")  # whatever torch.set_default_device says
        order = lengths.argsort(stable=True)
        starts = lengths.cumsum(0) - lengths
        sorted_lengths = lengths[order]
        sorted_starts = sorted_lengths.cumsum(0) - sorted_lengths
        positions = torch.arange(len(packed.ids), device="cpu") - sorted_starts.repeat_interleave(sorted_lengths)
        tokens = starts[order].repeat_interleave(sorted_lengths) + positions
        rows = order.repeat_interleave(sorted_lengths)
        cu_seqlens = F.pad(sorted_lengths.cumsum(0), (1, 0)).int()
        groups = tuple(sorted(Counter(packed.lengths).items()))
        layout = cls(groups, tokens, positions, rows, lengths, order, cu_seqlens, packed.max_seqlen)
        return on_device(layout, packed.ids.device)

    def mean(self, x: Tensor) -> Tensor:
        """`[T, C]` in this order -> the mean over each sequence, `[N, C]` in the order as given."""
        if x.is_cuda:  # index_add is not deterministic there; this is, and does not make the host wait
            lengths = self.counts[self.order]
            means = torch.segment_reduce(x, "mean", lengths=lengths, axis=0, unsafe=True)
            return torch.empty_like(means).index_copy(0, self.order, means)
        sums = x.new_zeros(len(self.counts), x.shape[-1]).index_add(0, self.rows, x)
        return sums / self.counts[:, None]

    def as_given(self, x: Tensor) -> Tensor:
        """`[T, C]` in this order -> in the order as given."""
        return torch.empty_like(x).index_copy(0, self.tokens, x)

    def blocks(self, x: Tensor) -> list[Tensor]:
        """`[T, …]` in this order -> for each group a view `[n, L, …]`."""
        parts = torch.split(x, [length * count for length, count in self.groups])
        return [torch.unflatten(part, 0, (n, length)) for part, (length, n) in zip(parts, self.groups, strict=True)]


def on_device(batch: _Batch, device: torch.device | str, non_blocking: bool = True) -> _Batch:
    """A copy of a frozen dataclass with its tensors moved, without the checks that would read them back."""
    moved = copy.copy(batch)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            object.__setattr__(moved, name, to_device(value, device, non_blocking))
    return moved


def to_device(tensor: Tensor, device: torch.device | str, non_blocking: bool = True) -> Tensor:
    """A tensor on a device. A GPU gets it from pinned memory: a copy from elsewhere may wait until the GPU has computed
    all that it was given before, and the host with it (CUDA's "API synchronization behavior")."""
    to_gpu = non_blocking and torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    # Not for a GPU that is planned for and is not here.
    if to_gpu and torch.cuda.is_initialized():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, …, {values[-1]}]"
