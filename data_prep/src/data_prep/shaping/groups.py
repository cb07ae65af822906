"""From pairs to groups."""

from __future__ import annotations

import numpy as np


def first_of_group(count: int, pairs: np.ndarray) -> np.ndarray:
    """For each of `count` items the smallest that `pairs` `[P, 2]` join it with, in any number of steps: `[count]`."""
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
