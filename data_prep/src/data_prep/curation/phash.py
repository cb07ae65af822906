"""Near-duplicate images by a 64-bit perceptual hash, and all pairs of hashes within a Hamming distance.

The hash is pHash (Zauner 2010): grey, 32 × 32, discrete cosine transform; a bit for each of the 8 × 8 lowest
frequencies is set if it is above their median. Re-encoding and resizing change a bit or two, another photo about half.
Not the imagehash package: it has no search for pairs, which is most of this file, and needs scipy for the transform.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

_SIDE, _KEPT = 32, 8
# What Pillow raises for files that are no images, broken or far too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# Standard deviation in grey levels; the hash of a flatter image is noise.
_FLAT = 2.0
_CHUNKS, _CHUNK_BITS = 4, 16
_PAIRS_AT_A_TIME = 4_000_000


def perceptual_hash(image: Image.Image) -> int | None:
    """The hash of an image as 64 bits, lowest frequency first; None for an image of a single colour."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    if grey.std() < _FLAT:
        return None
    low = (_cosines() @ grey @ _cosines().T).ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def buckets_within(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """(items, buckets), `[M]` int64: two of N hashes `[N]` share a bucket if they differ in at most `distance` bits."""
    different, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.argsort(which, kind="stable")  # the items of each different hash, side by side
    begins = np.cumsum(counts) - counts
    pairs = pairs_within(different, distance)
    # A bucket for each hash that several have, and one for each pair of hashes.
    several = np.flatnonzero(counts > 1)
    members = np.concatenate([several, pairs.ravel()])
    buckets = np.concatenate([np.arange(len(several)), len(several) + np.repeat(np.arange(len(pairs)), 2)])
    sizes = counts[members]
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[np.repeat(begins[members], sizes) + inside], np.repeat(buckets, sizes)


def pairs_within(different: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of different hashes that differ in at most `distance` bits, `[P, 2]` int64, the earlier one first.

    Multi-index hashing (Norouzi 2012): of two such hashes, one of the four quarters differs in at most `distance` // 4
    bits, so only hashes with such a quarter are compared.

    Args:
        different: `[N]` uint64, sorted. distance: 0 to 15.
    """
    if not 0 <= distance <= 15:
        raise ValueError(f"distance {distance}: expected 0 to 15; beyond that, a third of all images are alike")
    found = [np.zeros((0, 2), np.int64)]
    for chunk, mask in itertools.product(range(_CHUNKS), _masks(distance // _CHUNKS)):
        quarter = (different >> np.uint64(_CHUNK_BITS * chunk)).astype(np.uint16)
        for one, two in _equal_pairs(quarter, quarter ^ np.uint16(mask)):
            near = np.bitwise_count(different[one] ^ different[two]) <= distance
            found.append(np.stack([one[near], two[near]], 1))
    pairs = np.sort(np.concatenate(found).astype(np.int64), axis=1)
    return np.unique(pairs, axis=0)


def _equal_pairs(keys: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ones, twos), in parts, of all pairs one < two with keys[one] == wanted[two]."""
    order = np.argsort(keys, kind="stable")
    begins, ends = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
    counts = ends - begins
    position = 0
    while position < len(keys):
        upto = int(np.searchsorted(np.cumsum(counts[position:]), _PAIRS_AT_A_TIME, "right")) + position
        upto = max(upto, position + 1)
        part = counts[position:upto]
        two = np.repeat(np.arange(position, upto), part)
        place = np.arange(len(two)) - np.repeat(np.cumsum(part) - part, part) + np.repeat(begins[position:upto], part)
        one = order[place]
        yield one[one < two], two[one < two]
        position = upto


def _masks(bits: int) -> list[int]:
    """All 16-bit words with at most so many ones."""
    return [
        sum(1 << bit for bit in chosen)
        for count in range(bits + 1)
        for chosen in itertools.combinations(range(_CHUNK_BITS), count)
    ]


@functools.cache
def _cosines() -> np.ndarray:
    """The first rows of the DCT-II, `[8, 32]`."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))
