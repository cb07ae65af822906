"""The endless order of one source, in lanes: each batch takes from all of them, each rank reads only some.

The source's shards stand in a row, by a fixed permutation of their numbers, and the row is cut into lanes of equally
many samples. So a lane is some whole shards and at most two parts of shards. In an epoch the lanes take turns, in an
order that spreads any few turns over the row: a rank that owns a part of the row has its share of any batch. Within a
lane the shards are permuted anew in every epoch, and samples within windows of a few shards, so that reads stay local.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stage_trainer.data.stateless_rng import key, permutation

WINDOW = 4
"""Shards from which samples are mixed at a time, at least: over all lanes, of which each has one or more open."""


class SourceOrder:
    """The endless order of one source. An epoch shows every sample once.

    Args:
        shard_sizes: samples of each shard, 0 among them. Equally many shards are dealt to the lanes in the same way
            whatever the seed, so that another stage, or another source out of the same files, reads the same shards on
            a machine.
        seed: any integer; it determines the order within lanes.
        lanes: how many; of fewer shards with samples each is a lane.

    Attributes:
        samples: of an epoch.
        lanes: how many there are.
        window: shards whose samples are shuffled together, in each lane.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, lanes: int):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.samples = seed, int(sizes.sum())
        self.lanes = max(1, min(lanes, int(np.count_nonzero(sizes))))
        self.window = -(-WINDOW // self.lanes)
        row = permutation(len(sizes), key("lanes"))
        self._row = row[sizes[row] > 0]
        self._firsts = (np.cumsum(sizes) - sizes)[self._row]  # each shard's first sample; all in the row's order
        self._stops = np.cumsum(sizes[self._row])
        self._sample_starts, self._shards = np.sort(self._firsts), np.sort(self._row)
        self._turns = np.argsort(spread(self.lanes))  # of each lane
        per, over = divmod(self.samples, self.lanes)
        self._bounds = np.concatenate([[0], np.cumsum(per + (self._turns < over))])  # of the lanes, in the row
        self._pieces: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._windows: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._members: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def counts(self, start: int, stop: int) -> np.ndarray:
        """How many samples of positions `start` to `stop` are each lane's, int64 `[L]`."""
        none = np.zeros(self.lanes, dtype=np.int64)
        return sum((last - first for _, first, last in self._spans(start, stop)), start=none)

    def part(self, start: int, stop: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample, epoch), int64 `[high - low]`: number `low` to `high` of the samples at positions `start` to `stop`,
        lane after lane."""
        spans = self._spans(start, stop)
        ends = np.cumsum(self.counts(start, stop))
        samples, epochs = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for lane in _touched(ends, low, high):
            before = int(ends[lane - 1]) if lane else 0
            for epoch, first, last in spans:
                begin, size = int(first[lane]), int(last[lane] - first[lane])
                one, other = (min(max(bound - before, 0), size) for bound in (low, high))
                before += size
                if one < other:
                    samples.append(self._in_lane(lane, epoch, begin + one, begin + other))
                    epochs.append(np.full(other - one, epoch))
        return np.concatenate(samples), np.concatenate(epochs)

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The shards that samples are in, each once, in the order of their first samples."""
        found = self._shards[np.searchsorted(self._sample_starts, samples, side="right") - 1]
        return found[np.sort(np.unique(found, return_index=True)[1])]

    def ahead(self, start: int, stop: int, rank: int, world: int) -> list[int]:
        """The shards that the lanes of a rank read from position `start` to `stop`, and those of each lane's window
        after it, each once, in the order in which they are needed: the n-th windows of all lanes before the next."""
        lanes = range(rank * self.lanes // world, -(-(rank + 1) * self.lanes // world))
        of_lanes = [self._windows_ahead(lane, start, stop) for lane in lanes]
        most = max(map(len, of_lanes))
        found: dict[int, None] = {}
        for number in range(most):
            for windows in of_lanes:
                found.update(dict.fromkeys(windows[number].tolist() if number < len(windows) else ()))
        return list(found)

    def _windows_ahead(self, lane: int, start: int, stop: int) -> list[np.ndarray]:
        """The windows of shards that a lane reads between two positions, and the one after them."""
        shards, found, after = self._cut(lane)[0], list[np.ndarray](), False
        epoch, last = start // self.samples, stop // self.samples
        position = int(self._before(start - epoch * self.samples)[lane])
        until = int(self._before(stop - last * self.samples)[lane])
        while True:
            order, ends = self._of(lane, epoch)
            for number in range(int(np.searchsorted(ends, position, side="right")), len(ends)):
                found.append(shards[order[number * self.window : (number + 1) * self.window]])
                if after or len(found) >= 2 * len(ends):  # in two epochs all of them are among these
                    return found
                after = epoch > last or (epoch == last and ends[number] > until)
            epoch, position = epoch + 1, 0

    def _spans(self, start: int, stop: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Of each epoch that positions `start` to `stop` touch: (epoch, first, last), where each lane's samples `first`
        to `last` of the epoch are drawn, int64 `[L]`."""
        found = []
        for epoch in range(start // self.samples, -(-stop // self.samples)):
            offset = epoch * self.samples
            bounds = max(start - offset, 0), min(stop - offset, self.samples)
            found.append((epoch, self._before(bounds[0]), self._before(bounds[1])))
        return found

    def _before(self, offset: int) -> np.ndarray:
        """How many samples of each lane come before an offset in an epoch, int64 `[L]`."""
        return _turns_before(offset, self._turns)

    def _in_lane(self, lane: int, epoch: int, first: int, last: int) -> np.ndarray:
        """The samples from number `first` to `last` of a lane in an epoch."""
        _, ends = self._of(lane, epoch)
        parts = []
        for number in _touched(ends, first, last):
            start = int(ends[number - 1]) if number else 0
            parts.append(self._window(lane, epoch, number)[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def _window(self, lane: int, epoch: int, number: int) -> np.ndarray:
        """The samples of a window, in their order."""
        if lane not in self._members or self._members[lane][0] != (epoch, number):
            _, starts, sizes = self._cut(lane)
            pieces = self._of(lane, epoch)[0][number * self.window : (number + 1) * self.window]
            members = np.concatenate([np.arange(starts[p], starts[p] + sizes[p]) for p in pieces])
            order = permutation(len(members), key(self.seed, "window", lane, epoch, number))
            self._members[lane] = (epoch, number), members[order]
        return self._members[lane][1]

    def _of(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """A lane's pieces in the order of an epoch, and where in the epoch each window of them ends."""
        known = self._windows.setdefault(lane, {})
        if epoch not in known:
            sizes = self._cut(lane)[2]
            order = permutation(len(sizes), key(self.seed, "shards", lane, epoch))
            ends = np.cumsum(np.add.reduceat(sizes[order], np.arange(0, len(order), self.window)))
            near = {e: w for e, w in known.items() if abs(e - epoch) == 1}  # reads cross epochs
            self._windows[lane] = {**near, epoch: (order, ends)}
        return self._windows[lane][epoch]

    def _cut(self, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of a lane, whole shards and parts of them: (shard, first sample, samples)."""
        if lane not in self._pieces:
            low, high = self._bounds[lane : lane + 2]
            here = slice(np.searchsorted(self._stops, low, side="right"), np.searchsorted(self._stops, high) + 1)
            stops = self._stops[here]
            starts = np.concatenate([[0], self._stops[:-1]])[here]
            skipped = np.maximum(low - starts, 0)
            sizes = np.minimum(stops, high) - starts - skipped
            self._pieces[lane] = self._row[here], self._firsts[here] + skipped, sizes
        return self._pieces[lane]


class UncountedOrder:
    """The order of a source whose samples nobody has counted: sample `n · lanes + lane` is number n of a lane's stream,
    which has no end (`streamed.StreamedShards` reads it). Methods as those of `SourceOrder`.

    Args:
        lanes: how many.
    """

    def __init__(self, lanes: int):
        self.lanes = lanes
        self._turns = np.argsort(spread(lanes))

    def part(self, start: int, stop: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample, 0), int64 `[high - low]`; as `SourceOrder.part`."""
        first, last = _turns_before(start, self._turns), _turns_before(stop, self._turns)
        ends, found = np.cumsum(last - first), [np.zeros(0, dtype=np.int64)]
        for lane in _touched(ends, low, high):
            before = int(ends[lane] - (last - first)[lane])
            numbers = np.arange(max(low - before, 0), min(high, int(ends[lane])) - before) + first[lane]
            found.append(numbers * self.lanes + lane)
        samples = np.concatenate(found)
        return samples, np.zeros_like(samples)

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """None: which shard a sample is in is known when it has been read."""
        return np.zeros(0, dtype=np.int64)

    def ahead(self, start: int, stop: int, rank: int, world: int) -> list[int]:
        """None: each lane's reader looks ahead by itself."""
        return []


def _turns_before(offset: int, turns: np.ndarray) -> np.ndarray:
    """How many of the first `offset` turns are each lane's, int64 `[L]`."""
    found: np.ndarray = (offset - turns + len(turns) - 1) // len(turns)
    return found


def _touched(ends: np.ndarray, low: int, high: int) -> range:
    """Of parts in a row that end at `ends` the numbers of those with something between `low` and `high`."""
    if low >= high:
        return range(0)
    first, last = np.searchsorted(ends, [low, high - 1], side="right").tolist()
    return range(first, last + 1)


def spread(count: int) -> np.ndarray:
    """An order of range(count), int64, in which any few numbers in a row are spread evenly: place n has the number n
    with its digits reversed, in a system whose places are the prime factors of `count`, smallest first. If that is a
    power of two, any 2^k in a row fall into 2^k equal parts of the range, one into each."""
    order, left, factor = np.zeros(1, dtype=np.int64), count, 2
    while left > 1:
        while left % factor:
            factor += 1
        left //= factor
        order = (np.arange(factor)[:, None] * left + order[None]).ravel()  # the new digit changes least often so far
    return order
