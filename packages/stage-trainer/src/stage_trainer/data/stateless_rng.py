"""Random numbers as functions of keys: the same on any rank, in any worker, after any restart.

There is no state, and no library's random stream, which may change between versions.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(*parts: object) -> int:
    """A 63-bit hash of the `repr` of all parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(n: int, seed: int) -> np.ndarray:
    """A permutation of range(n), int64 `[n]`: the order of splitmix64 hashes under `seed`."""
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")
