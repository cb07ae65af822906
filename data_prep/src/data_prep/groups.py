"""Equal hashes to pairs, pairs to groups (union-find), and what falls to an earlier item that is like it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

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


def fallen(
    items: np.ndarray, buckets: np.ndarray, alike: Callable[[int, np.ndarray], int]
) -> Iterator[tuple[int, int]]:
    """(item, the earlier item that it falls to) of all that do not stay, in order.

    Greedy: an item falls if it is like an earlier one that stays and shares a bucket with it. What has fallen takes
    nothing with it, so chains of neighbours do not collapse. With n in a bucket that all stay, n²/2 are compared.

    Args:
        items, buckets: `[M]` int64, an item and a bucket that it is in.
        alike: called with an item and the items to compare it with, `[S]` ascending; one of them, or -1.
    """
    order = np.lexsort((buckets, items))
    items, buckets = items[order], buckets[order]
    begins = np.flatnonzero(np.diff(items, prepend=-1))
    staying: defaultdict[int, list[int]] = defaultdict(list)
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(items)], strict=False):
        item, own = int(items[begin]), buckets[begin:end].tolist()
        near = sorted(set().union(*(staying[bucket] for bucket in own)))
        found = alike(item, np.array(near)) if near else -1
        if found >= 0:
            yield item, found
        else:
            for bucket in own:
                staying[bucket].append(item)


def shared(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(items, buckets), `[M]` int64 each, of all of N items whose hash another one has; buckets count from 0."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    again = np.zeros(len(hashes) + 1, bool)  # as the one before
    again[1:-1] = hashes[1:] == hashes[:-1]
    inside = again[:-1] | again[1:]
    return order[inside], np.cumsum(~again[:-1][inside]) - 1
