"""Equal hashes to pairs, and pairs to groups (union-find), in some 30 bytes an item."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_AT_A_TIME = 2**18


def pairs_of_equals(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs (earlier, later) of equal ones among N hashes, in parts `[P, 2]` int64.

    Each item is paired with the first that has its hash, and with the one before it that has.
    """
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    same = np.concatenate([np.zeros(1, bool), hashes[1:] == hashes[:-1]])  # as the one before
    del hashes
    begin = 0  # the first place of the current hash
    for start in range(0, len(order), _AT_A_TIME):
        again = same[start : start + _AT_A_TIME]
        places = np.arange(start, start + len(again))
        begins = np.maximum.accumulate(np.where(again, begin, places))
        begin = int(begins[-1])
        first, before, later = order[begins[again]], order[places[again] - 1], order[places[again]]
        yield np.concatenate([np.stack([first, later], 1), np.stack([before, later], 1)])


def join(first: np.ndarray, pairs: np.ndarray) -> None:
    """Merge groups along `pairs` `[P, 2]`, in place: `first` `[N]` holds the smallest item of each item's group."""
    if not len(pairs):
        return
    heads, numbers = np.unique(first[pairs], return_inverse=True)
    first[heads] = heads[first_of_group(len(heads), numbers.reshape(-1, 2))]
    for start in range(0, len(first), _AT_A_TIME):
        first[start : start + _AT_A_TIME] = first[first[start : start + _AT_A_TIME]]


def first_of_group(count: int, pairs: np.ndarray) -> np.ndarray:
    """Union-find: for each of `count` items the smallest that `pairs` `[P, 2]` connect it with, `[count]`."""
    first = list(range(count))

    def find(item: int) -> int:
        root = item
        while first[root] != root:
            root = first[root]
        while first[item] != root:
            first[item], item = root, first[item]
        return root

    for one, two in pairs.tolist():
        low, high = sorted((find(one), find(two)))
        first[high] = low
    return np.fromiter((find(item) for item in range(count)), np.int64, count)
