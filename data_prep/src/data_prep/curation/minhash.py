"""Near-duplicate texts by MinHash (Broder 1997) and banding.

Not datasketch, whose MinHash LSH takes 25 times as long for each text (`benchmarks/near_duplicates.py`: a million texts
take 29 processor seconds here, 5,000 take 3.6 there).

A text is the set of its runs of five characters, after normalisation; that works for all thirty languages, with spaces
between words or without. The probability that two texts agree in one of the `PERMUTATIONS` minima is the Jaccard
similarity of their sets, so the share of minima that agree estimates it. `BANDS` groups of `ROWS` minima find the pairs
to compare: of pairs with similarity 0.8, 99.8 % share a group; with 0.5, 27 %.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from data_prep.groups import join, pairs_of_equals

BANDS, ROWS = 20, 6
PERMUTATIONS = BANDS * ROWS
_SHINGLE = 5
_PAIRS = 10_000  # compared at a time
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: the golden ratio in 64 bits

_VARIATION = range(0xFE00, 0xFE10)  # selectors of a sign's style


def _marks() -> str:
    r"""Vowel signs, points and accents (category M), as ranges; \w excludes them, though words differ by them."""
    found = [
        code
        for code in range(0x300, 0x20000)
        if unicodedata.category(chr(code)).startswith("M") and code not in _VARIATION
    ]
    runs = (list(run) for _, run in groupby(enumerate(found), key=lambda one: one[1] - one[0]))
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


_BETWEEN_WORDS = re.compile(rf"[^\w{_marks()}]+|_+")
_BETWEEN_ASCII = re.compile(r"[\W_]+")  # the same for ASCII, at less than half the cost
_ARTICLES = re.compile(r"^(a|an|the|some)\s+")


def normalize_text(text: str) -> str:
    """The words of a text, for comparison. Texts of signs alone ("⁇") are kept.

    The corpus keeps a coarser rule (`corpus.items.normalized`), which its published figures rest on.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    between = _BETWEEN_ASCII if folded.isascii() else _BETWEEN_WORDS
    words = " ".join(between.sub(" ", folded).split())
    return _ARTICLES.sub("", words) or folded


class Signed(Protocol):
    """The signatures of N texts, in memory (`Signatures`) or on the disk (`SignatureStore`)."""

    def __len__(self) -> int: ...

    def band(self, number: int) -> np.ndarray:
        """Each text's hash of a group of minima, `[N]` uint64."""
        ...

    def low_of(self, texts: np.ndarray) -> np.ndarray:
        """The low bytes of the minima of some texts, `[M, PERMUTATIONS]` uint8."""
        ...


@dataclass(frozen=True)
class Signatures:
    """The MinHash signatures of N texts, 280 bytes each.

    bands: `[N, BANDS]` uint64, a hash of each group of minima. low: `[N, PERMUTATIONS]` uint8, the minima's low bytes.
    """

    bands: np.ndarray
    low: np.ndarray

    def __len__(self) -> int:
        return len(self.low)

    @classmethod
    def join(cls, parts: Sequence[Signatures]) -> Signatures:
        """Concatenate several batches."""
        return cls(np.concatenate([part.bands for part in parts]), np.concatenate([part.low for part in parts]))

    def band(self, number: int) -> np.ndarray:
        column: np.ndarray = self.bands[:, number]
        return column

    def low_of(self, texts: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self.low[texts]
        return rows

    def to_bytes(self) -> list[bytes]:
        """One record for each text, to store elsewhere."""
        return [bands.tobytes() + low.tobytes() for bands, low in zip(self.bands.astype("<u8"), self.low, strict=True)]

    @classmethod
    def from_bytes(cls, kept: bytes) -> Signatures:
        """From the concatenated records of `to_bytes`."""
        rows = np.frombuffer(kept, np.uint8).reshape(-1, 8 * BANDS + PERMUTATIONS)
        bands = np.ascontiguousarray(rows[:, : 8 * BANDS]).view("<u8").astype(np.uint64)
        return cls(bands, rows[:, 8 * BANDS :])


def signatures(texts: Sequence[str]) -> Signatures:
    """The signatures of a batch of texts; some thousands at a time take little memory."""
    if not texts:
        return Signatures(np.zeros((0, BANDS), np.uint64), np.zeros((0, PERMUTATIONS), np.uint8))
    shingles, starts = _shingles(texts)
    minima = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for number, (factor, offset) in enumerate(_hash_functions()):
        minima[:, number] = np.minimum.reduceat(shingles * factor + offset, starts)
    bands = np.zeros((len(texts), BANDS), np.uint64)
    rows = minima.reshape(len(texts), BANDS, ROWS).astype(np.uint64)
    for row in range(ROWS):
        bands = _mixed(bands ^ rows[:, :, row])
    return Signatures(bands, minima.astype(np.uint8))


def near_duplicates(found: Signed, *, similarity: float = 0.8) -> np.ndarray:
    """For each of N texts the number of the first text of its group, `[N]` int64; its own number if it is the first.

    Two texts are in one group if their estimated Jaccard similarity is at least `similarity`, or if a chain of such
    pairs joins them. In each group of equal band hashes, every text is compared with the first and with its neighbour.
    """
    first = np.arange(len(found))
    for band in range(BANDS):
        for pairs in pairs_of_equals(found.band(band)):
            open_ = pairs[first[pairs[:, 0]] != first[pairs[:, 1]]]
            join(first, open_[_alike(found, open_) >= similarity])
    return first


def _alike(found: Signed, pairs: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of each pair, `[P]`; low bytes agree by chance once in 256."""
    share = np.empty(len(pairs))
    for start in range(0, len(pairs), _PAIRS):
        low = found.low_of(pairs[start : start + _PAIRS].ravel()).reshape(-1, 2, PERMUTATIONS)
        share[start : start + _PAIRS] = (low[:, 0] == low[:, 1]).mean(axis=1)
    return (share - 1 / 256) / (1 - 1 / 256)


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all runs of five characters, uint32; where each text's begin). A shorter text is one run."""
    padded = [normalize_text(text).ljust(_SHINGLE) for text in texts]
    characters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.fromiter((len(text) for text in padded), np.int64, len(padded))
    runs = np.zeros(len(characters) - _SHINGLE + 1, np.uint64)
    for place in range(_SHINGLE):
        runs = _mixed(runs + characters[place : place + len(runs)])
    ends = np.cumsum(lengths)
    inside = np.ones(len(runs) + _SHINGLE - 1, bool)
    for place in range(1, _SHINGLE):
        inside[ends - place] = False  # runs that reach into the next text
    counts = lengths - _SHINGLE + 1
    return (runs[inside[: len(runs)]] >> np.uint64(32)).astype(np.uint32), np.concatenate([[0], np.cumsum(counts)[:-1]])


def _mixed(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each value."""
    values = values * _MIX
    mixed: np.ndarray = values ^ (values >> np.uint64(29))
    return mixed


def _hash_functions() -> list[tuple[np.uint32, np.uint32]]:
    """Factors (odd) and offsets of `PERMUTATIONS` multiplicative hashes, the same in every run."""
    drawn = np.random.Generator(np.random.PCG64(20240229)).integers(0, 2**32, (PERMUTATIONS, 2), np.uint32)
    return [(np.uint32(factor | 1), np.uint32(offset)) for factor, offset in drawn]


def matches(texts: Signatures, known: Signatures, *, similarity: float) -> np.ndarray:
    """Whether each of N texts is a near-duplicate of a known one, `[N]` bool; one text of each bucket is compared."""
    found = np.zeros(len(texts), bool)
    if not len(texts) or not len(known):
        return found
    for band in range(BANDS):
        order = np.argsort(known.bands[:, band], kind="stable")
        there = known.bands[order, band]
        place = np.minimum(np.searchsorted(there, texts.bands[:, band]), len(there) - 1)
        candidates = np.flatnonzero(there[place] == texts.bands[:, band])
        share = (texts.low[candidates] == known.low[order[place[candidates]]]).mean(axis=1)
        found[candidates[(share - 1 / 256) / (1 - 1 / 256) >= similarity]] = True
    return found
