"""Which samples make global batch *n*, and which of them are a rank's: functions of (seed, n), in closed form.

A text batch comes from one source; an image batch mixes its sources by their rates. The samples of a batch do not
depend on the number of ranks, and a rank computes its own alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stage_trainer.data.lanes import SourceOrder, UncountedOrder

MIXED = 8
"""A source's share of a batch may miss its rate by one part in so many, so that a rank's lanes hold all of its own."""


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: sample `index` of the task's source number `source`."""

    source: int
    index: int
    epoch: int


@dataclass(frozen=True)
class Draws:
    """Samples of a batch, int64 `[n]` each: the number of the source, the sample in it, the source's epoch."""

    source: np.ndarray
    index: np.ndarray
    epoch: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def within(self, start: int, stop: int) -> list[Draw]:
        """Those from number `start` to `stop`."""
        columns = (column[start:stop].tolist() for column in (self.source, self.index, self.epoch))
        return [Draw(*row) for row in zip(*columns, strict=True)]


class TaskSampler:
    """The batches of one task.

    Args:
        orders: one per source.
        rates: how often each source is drawn, relative to the others.
        batch: global batch size.
        one_source: whether a batch comes from a single source (text) or mixes them (images).
    """

    def __init__(
        self, orders: Sequence[SourceOrder | UncountedOrder], rates: Sequence[float], batch: int, *, one_source: bool
    ):
        self.orders, self.batch = list(orders), batch
        self.shares = np.array(rates, dtype=np.float64) / sum(rates)
        alone = one_source or len(self.orders) == 1
        self.unit = batch if alone else _unit(batch, max(o.lanes for o in self.orders), len(self.orders))

    def bounds(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions in each source's stream at which global batch `n` begins and ends, int64 `[sources]` each."""
        start, stop = (apportioned(self.shares, each * self.batch // self.unit) * self.unit for each in (n, n + 1))
        return start, stop

    def source_of(self, n: int) -> int:
        """The source of batch `n`, where a batch comes from a single one; else the one that it has most of."""
        start, stop = self.bounds(n)
        return int(np.argmax(stop - start))

    def part(self, n: int, rank: int = 0, world: int = 1) -> Draws:
        """A rank's part of global batch `n`, source after source and lane after lane. All ranks' parts together are the
        part of a single rank; sizes differ by at most one, and so do those of each source's part.

        If the batch and the numbers of lanes are multiples of the number of ranks, which is a power of two, a rank's
        samples are all out of lanes that no other rank reads. Else neighbours share lanes.
        """
        starts, stops = self.bounds(n)
        sizes = stops - starts
        columns, before = [], 0
        # Those that divide evenly come first, so that they do not get the rest of the others.
        for source in sorted(range(len(sizes)), key=lambda s: (int(sizes[s]) % world != 0, s)):
            size = int(sizes[source])
            # As if draws were dealt out in turn, over all sources: how many are of ranks below this one, and the next.
            low, high = (_dealt(before + size, r, world) - _dealt(before, r, world) for r in (rank, rank + 1))
            before += size
            index, epoch = self.orders[source].part(int(starts[source]), int(stops[source]), low, high)
            columns.append((np.full(len(index), source), index, epoch))
        return Draws(*(np.concatenate(each) for each in zip(*columns, strict=True)))

    def shards_ahead(self, n: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """For each source the shards of a rank's part of batch `n` and of the next ones, in the order of reading."""
        starts, stops = self.bounds(n)
        part = self.part(n, rank, world)
        return [
            list(
                dict.fromkeys(
                    [
                        *order.shards_of(part.index[part.source == source]).tolist(),
                        *order.ahead(int(starts[source]), int(stops[source]) + self.batch, rank, world),
                    ]
                )
            )
            for source, order in enumerate(self.orders)
        ]


def apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """How many of the first `total` turns are each source's, int64 `[sources]`, by `shares` that add up to 1.

    Source s has its turn number j at the time (j + phase_s) / share_s, and turns are taken in the order of their times,
    so a larger `total` never gives a source fewer. Phases are spread, so that sources of equal shares come apart.
    """
    phases = (0.5 + np.arange(len(shares)) * ((5**0.5 - 1) / 2)) % 1.0

    def time(number: np.ndarray) -> np.ndarray:
        times: np.ndarray = (number + phases) / shares
        return times

    taken: np.ndarray = np.maximum(np.floor(total * shares - phases).astype(np.int64) + 1, 0)
    taken -= (taken > 0) & (time(taken - 1) > total)  # the division may have rounded another way
    taken += time(taken) <= total
    while (missing := total - int(taken.sum())) > 0:
        taken[np.argmin(time(taken))] += 1
    while missing < 0:
        last = np.where(taken > 0, time(taken - 1), -np.inf)
        taken[len(last) - 1 - np.argmax(last[::-1])] -= 1  # of equal ones the last source: turns go by (time, source)
        missing += 1
    return taken


def _unit(batch: int, lanes: int, sources: int) -> int:
    """A divisor of every source's part of a batch. A rank gets its equal part of that out of its own lanes alone if the
    number of ranks divides it, so it is the largest one that divides batch and lanes and leaves the rates nearly as
    they are."""
    both, most = math.gcd(batch, lanes), max(1, batch // (MIXED * sources))
    return max(divisor for divisor in range(1, min(both, most) + 1) if both % divisor == 0)


def _dealt(count: int, rank: int, world: int) -> int:
    """How many of `count` things that are dealt to `world` ranks in turn are of those before `rank`."""
    return count // world * rank + min(count % world, rank)
