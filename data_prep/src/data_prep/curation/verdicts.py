"""What becomes of each sample when samples are compared: it stays, or falls to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.groups import join, pairs_of_equals

KEPT, EXACT, NEAR, TEST, BROKEN = range(5)
REASONS = {
    EXACT: "the same as an earlier one",
    NEAR: "nearly the same as an earlier one",
    TEST: "in an evaluation set",
    BROKEN: "an image that cannot be decoded",
}


class Verdicts:
    """The verdicts on N samples, of which the first `begin` are those of evaluation sets and stay.

    Attributes:
        what: `[N]` uint8, KEPT or a key of `REASONS`. to: `[N]` int64, the sample that each falls to, or itself.
    """

    def __init__(self, count: int, begin: int) -> None:
        self.begin = begin
        self.what = np.full(count, KEPT, np.uint8)
        self.to = np.arange(count)

    def equals(self, keys: np.ndarray) -> None:
        """Samples with equal keys, `[M, 2]` uint64 of the last M samples, fall to the first of them."""
        first = np.arange(len(keys))
        for pairs in pairs_of_equals(keys[:, 0]):
            join(first, pairs[keys[pairs[:, 0], 1] == keys[pairs[:, 1], 1]])
        offset = len(self.to) - len(keys)
        later = np.flatnonzero(first != np.arange(len(keys)))
        self.fall(later + offset, first[later] + offset, EXACT)

    def fall(self, items: np.ndarray, to: np.ndarray, what: int) -> None:
        """`items` `[M]` fall to `to` `[M]`; what falls to a sample of an evaluation set is in that set."""
        ours = items >= self.begin
        items, to = items[ours], to[ours]
        self.to[items] = to
        self.what[items] = np.where(to < self.begin, TEST, what)

    def settle(self) -> None:
        """What falls to one that fell itself, as only copies do, shares its fate."""
        copies = np.flatnonzero(self.what == EXACT)
        first = self.to[copies]
        self.to[copies] = self.to[first]
        shared = np.isin(self.what[first], (TEST, BROKEN))
        self.what[copies[shared]] = self.what[first[shared]]

    def parts(self, sizes: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """For each piece of the samples that are no evaluation set's, by the sizes of the pieces: `values` and `to` of
        its samples, and `taken` `[M, 2]`, (place in the piece, number of a sample that fell to this one).
        """
        fell = np.flatnonzero((self.what == EXACT) | (self.what == NEAR))
        fell = fell[np.argsort(self.to[fell], kind="stable")]
        place = self.begin
        for size in sizes:
            first, last = np.searchsorted(self.to[fell], [place, place + size])
            taken = np.stack([self.to[fell[first:last]] - place, fell[first:last]], axis=1)
            own = slice(place, place + size)
            yield {"values": self.what[own], "to": self.to[own], "taken": taken}
            place += size
