"""Which samples make global batch *n*: a function of (seed, n), the same on every rank and for every world size.

A source is an endless stream. Each epoch is a permutation of it: shards are permuted, then samples within windows of a
few shards, so that reads stay local. A text batch comes from one source; an image batch mixes its sources by their
rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stage_trainer.data.stateless_rng import key, permutation

WINDOW = 4
"""Shards whose samples are shuffled together."""


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: sample `index` of the task's source number `source`."""

    source: int
    index: int
    epoch: int


class SourceOrder:
    """The endless order of one source.

    Args:
        shard_sizes: samples of each shard.
        seed: any integer; it determines the order.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.shard_sizes.sum())
        self.seed = seed
        self._first = np.concatenate([[0], np.cumsum(self.shard_sizes)[:-1]])
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None
        self._windows: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) at a position of the stream."""
        epoch, number, offset = self._window(position)
        return epoch, int(self._order(epoch, number, self._of(epoch)[0][number])[offset])

    def shards(self, start: int, stop: int) -> list[int]:
        """The shards that are read from position `start` to `stop`, and those of the window after it, each once, in
        the order in which the stream reads their windows."""
        found: dict[int, None] = {}
        position = start
        while True:
            epoch, number, offset = self._window(position)
            window = self._of(epoch)[0][number]
            found.update(dict.fromkeys(window.tolist()))
            if position >= stop or len(found) == len(self.shard_sizes):
                return list(found)
            position += int(self.shard_sizes[window].sum()) - offset

    def _window(self, position: int) -> tuple[int, int, int]:
        """(epoch, number of the window in it, offset in the window) of a position."""
        epoch, offset = divmod(position, self.samples)
        _, ends = self._of(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        return epoch, number, offset - (int(ends[number - 1]) if number else 0)

    def _of(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The windows of an epoch, and the position within it at which each ends."""
        if epoch not in self._windows:
            shards = permutation(len(self.shard_sizes), key(self.seed, "shards", epoch))
            windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
            ends = np.cumsum([self.shard_sizes[w].sum() for w in windows])
            near = {e: w for e, w in self._windows.items() if abs(e - epoch) == 1}  # reads cross epochs
            self._windows = {**near, epoch: (windows, ends)}
        return self._windows[epoch]

    def _order(self, epoch: int, number: int, shards: np.ndarray) -> np.ndarray:
        if self._cached is None or self._cached[0] != (epoch, number):
            members = np.concatenate([self._first[s] + np.arange(self.shard_sizes[s]) for s in shards])
            self._cached = (epoch, number), members[permutation(len(members), key(self.seed, "window", epoch, number))]
        return self._cached[1]


class TaskSampler:
    """The batches of one task.

    Args:
        orders: one per source.
        rates: how often each source is drawn, relative to the others.
        batch: global batch size.
        one_source: whether a batch comes from a single source (text) or mixes them (images).
    """

    def __init__(self, orders: Sequence[SourceOrder], rates: Sequence[float], batch: int, *, one_source: bool):
        self.orders, self.batch, self.one_source = list(orders), batch, one_source
        self.shares = [rate / sum(rates) for rate in rates]
        self._cursors = self._starts = [0] * len(self.orders)
        self._next = 0

    def batch_at(self, n: int) -> list[Draw]:
        """The draws of global batch `n`. Calls with rising `n` cost one batch each, others replay the cursors."""
        if n < self._next:
            self._cursors, self._next = [0] * len(self.orders), 0
        while self._next < n:
            self._advance()
        self._starts = list(self._cursors)
        counts = self._advance()
        draws = []
        for source, (start, count) in enumerate(zip(self._starts, counts, strict=True)):
            for position in range(start, start + count):
                epoch, index = self.orders[source].at(position)
                draws.append(Draw(source, index, epoch))
        return draws

    def shards_ahead(self) -> list[list[int]]:
        """For each source the shards of the last requested batch and the next ones, in reading order."""
        return [
            order.shards(start, cursor + self.batch)
            for order, start, cursor in zip(self.orders, self._starts, self._cursors, strict=True)
        ]

    def _advance(self) -> list[int]:
        """Moves past one batch; returns its count per source. The source furthest behind its share comes first."""
        total = (self._next + 1) * self.batch
        due = [share * total - cursor for share, cursor in zip(self.shares, self._cursors, strict=True)]
        counts = [0] * len(due)
        if self.one_source:
            counts[int(np.argmax(due))] = self.batch
        else:
            counts = [max(0, int(d)) for d in due]
            while (missing := self.batch - sum(counts)) != 0:
                step = 1 if missing > 0 else -1
                lag = [step * (d - c) if step > 0 or c else -np.inf for d, c in zip(due, counts, strict=True)]
                counts[int(np.argmax(lag))] += step
        self._cursors = [cursor + count for cursor, count in zip(self._cursors, counts, strict=True)]
        self._next += 1
        return counts


def slice_of(draws: list[Draw], rank: int, world: int) -> list[Draw]:
    """A rank's part of a global batch: every `world`-th draw, so that each rank gets its share of every source and of
    the long texts. Sizes differ by at most one."""
    return draws[rank::world]
