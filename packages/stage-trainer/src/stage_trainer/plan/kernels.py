"""What the operations of a pass ask of a device: of each its operations and bytes, and which of them a compiler fuses.

An operation of PyTorch that is run one by one reads all of its inputs from memory and writes all of its outputs there;
views cost nothing. torch.compile runs what lies between two matrix products as few kernels as it can: operations that
hand tensors to one another become one, which reads what comes from outside and writes what is used outside
(`fused`). Matrix products and attention stay kernels of their own, as in Inductor's default mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Work = Counter["Kernel"]
"""Kernels and how often each runs; a share of a kernel is one that runs on so much of its data."""

View = tuple[int, int, int]
"""A part of a storage: the storage's number, where it starts, its bytes."""


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        kind: "product" of matrices, fused "attention", or "memory": anything else.
        bytes: read and written.
        written: of these.
        operations: of a product or of attention, as they are counted (`flops`), backward with the scores made again.
        shape: of a product (batch, m, n, k) for `[m, k]` times `[k, n]`; of attention (sequences times heads, queries,
            keys, channels of a head).
        dtype: of the inputs of a product or of attention: "bf16", "fp16", "fp32" or "fp8".
        aligned: whether all rows of a product's matrices begin at a multiple of 16 bytes, as its fast kernels need.
    """

    kind: Literal["product", "attention", "memory"]
    bytes: int
    written: int = 0
    operations: int = 0
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    dtype: str = ""
    aligned: bool = True


@dataclass(frozen=True)
class Event:
    """A kernel as it was run, with what it read and wrote."""

    kernel: Kernel
    reads: tuple[View, ...]
    writes: tuple[View, ...]


@dataclass
class Tape:
    """Records what runs, in sections.

    Attributes:
        number: gives each storage a number that no other one gets, dead ones included.
        sections: the events up to each `cut`.
    """

    number: Callable[[Tensor], int]
    sections: list[list[Event]] = field(default_factory=lambda: [[]])

    def cut(self) -> None:
        self.sections.append([])

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Enters a call of an aten operation."""
        name: str = func._schema.name.removeprefix("aten::")
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not outputs or name.startswith(("empty", "new_empty")):
            return
        read = [self._view(t) for t in inputs]
        written = [self._view(t) for t in outputs]
        if not func._schema.is_mutable and {number for number, *_ in written} <= {number for number, *_ in read}:
            return  # a view
        if name in _OVERWRITES:
            read = read[1:]
        elif name in _LOOKS_UP:  # of the table the rows that are looked up
            read = [*read[1:], *((-number, start, size) for number, start, size in written)]
        reads, writes = tuple(dict.fromkeys(read)), tuple(dict.fromkeys(written))
        size = sum(size for *_, size in reads) + (out := sum(size for *_, size in writes))
        kernel = _product(name, args, outputs, size, out) or _attention(name, args, size, out)
        self.sections[-1].append(Event(kernel or Kernel("memory", size, out), reads, writes))

    def _view(self, tensor: Tensor) -> View:
        """Numbers that are repeated along a dimension lie in memory once."""
        count = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else min(1, size)
        return self.number(tensor), int(tensor.storage_offset()), count * tensor.element_size()


_OVERWRITES = {"copy_", "fill_", "zero_"}
_LOOKS_UP = {"embedding", "index", "index_select", "gather"}
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}


def _product(name: str, args: Any, outputs: list[Tensor], size: int, out: int) -> Kernel | None:
    pair = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}.get(name)
    if pair is None:
        return None
    a, b = args[pair], args[pair + 1]
    *batch, m, k = a.shape
    shape = (batch[0] if batch else 1, m, b.shape[-1], k)
    operations = 2 * shape[0] * m * shape[2] * k
    aligned = all(max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in (a, b, outputs[0]))
    return Kernel("product", size, out, operations, shape, _DTYPES.get(a.dtype, "fp32"), aligned)


def _attention(name: str, args: Any, size: int, out: int) -> Kernel | None:
    if "flash_attention" not in name and "efficient_attention" not in name:
        return None
    backward = "backward" in name
    q, k = (args[1], args[2]) if backward else (args[0], args[1])
    if q.ndim == 3:  # packed `[T, heads, channels]`, sequences alike
        sequences = len(args[6 if backward else 3]) - 1
        shape = (sequences * q.shape[1], q.shape[0] // sequences, k.shape[0] // sequences, q.shape[2])
    else:
        shape = (q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3])
    products = 5 if backward else 2  # backward the scores are computed again
    operations = 2 * products * shape[0] * shape[1] * shape[2] * shape[3]
    return Kernel("attention", size, out, operations, shape, _DTYPES.get(q.dtype, "fp32"))


def one_by_one(section: Sequence[Event]) -> Work:
    """The kernels of a section that is not compiled."""
    return Counter(event.kernel for event in section)


def fused(sections: Sequence[Sequence[Event]], number: int) -> Work:
    """The kernels of section `number` once it is compiled.

    Args:
        sections: all of the pass: what another one reads has to be written.
        number: of the section to be fused.
    """
    readers: dict[int, set[tuple[int, int]]] = {}
    for s, section in enumerate(sections):
        for place, event in enumerate(section):
            for storage, *_ in event.reads:
                readers.setdefault(storage, set()).add((s, place))
    work: Work = Counter()
    for group in _groups(sections[number]):
        first = sections[number][group[0]]
        if first.kernel.kind != "memory":
            work[first.kernel] += 1
            continue
        inside = {(number, place) for place in group}
        events = [sections[number][place] for place in group]
        made = {storage for event in events for storage, *_ in event.writes}
        reads, seen = dict[View, None](), set[int]()
        for event in events:
            reads.update((view, None) for view in event.reads if view[0] not in seen)
            seen.update(storage for storage, *_ in event.writes)
        kept = {s for s in made if s not in readers or readers[s] - inside}
        writes = {view for event in events for view in event.writes if view[0] in kept}
        out = sum(size for *_, size in writes)
        work[Kernel("memory", out + sum(size for *_, size in reads), out)] += 1
    return work


def _groups(section: Sequence[Event]) -> Iterator[list[int]]:
    """Places of the events that become one kernel: those between two products that hand tensors to one another."""
    run: list[int] = []
    for place, event in enumerate(section):
        if event.kernel.kind == "memory":
            run.append(place)
            continue
        yield from _connected(section, run)
        yield [place]
        run = []
    yield from _connected(section, run)


def _connected(section: Sequence[Event], run: list[int]) -> list[list[int]]:
    group_of: dict[int, list[int]] = {}  # by storage: the group that made it
    groups: list[list[int]] = []
    for place in run:
        event, joined = section[place], [place]
        for storage, *_ in (*event.reads, *event.writes):
            if (other := group_of.get(storage)) is not None and other is not joined:
                joined[:0] = other
                groups = [group for group in groups if group is not other]
                group_of = {s: joined if group is other else group for s, group in group_of.items()}
        group_of.update((storage, joined) for storage, *_ in event.writes)
        groups.append(joined)
    return [sorted(group) for group in groups]


def of_pass(sections: Sequence[Sequence[Event]], depth: int, more: int, compiled: bool) -> tuple[Work, Work, Work]:
    """Kernels of a tower's forward pass without a backward one, of one with it, and of the backward pass.

    Args:
        sections: what ran before the blocks and in each of `depth` blocks, then backward in each, from the top down,
            below them, and for casts of the blocks' weights that were made before, if there are any.
        more: blocks of the tower that were not run; they are like the second, backward the second from the top.
        compiled: whether blocks are.
    """
    there, back = sections[: depth + 1], sections[depth + 1 : -1]

    def work(of: Sequence[Sequence[Event]], blocks: range, alike: int) -> Work:
        total: Work = Counter()
        for number in blocks:
            found = fused(of, number) if compiled else one_by_one(of[number])
            total.update({kernel: times * (1 + more * (number == alike)) for kernel, times in found.items()})
        return total

    first, forth = (one_by_one(there[0]) + work(of, range(1, depth + 1), 2) for of in (there, [*there, *back]))
    start, stop = depth + 1, depth + 1 + min(depth, len(back))
    backward = work([*there, *back], range(start, stop), start + 1)
    for number, section in enumerate(back[depth:]):
        for kernel, times in one_by_one(section).items():
            backward[kernel] += times * (1 + number * more / depth)  # type: ignore[assignment]
    return first, forth, backward
