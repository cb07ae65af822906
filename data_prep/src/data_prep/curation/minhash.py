"""Near-duplicate texts by MinHash (Broder 1997) and banding.

Not datasketch, whose MinHash LSH takes ten times as long for each text (`benchmarks/near_duplicates.py`: a million
texts take 36 processor seconds here, 10,000 take 3.6 there).

A text is the set of its runs of five characters, after normalisation; that works for all thirty languages, with spaces
between words or without. The probability that two texts agree in one of the `PERMUTATIONS` minima is the Jaccard
similarity of their sets, so the share of minima that agree estimates it. `BANDS` groups of `ROWS` minima find the pairs
to compare: of pairs with similarity 0.8, 99.8 % share a group; with 0.5, 27 %. What the estimate leaves open, the texts
themselves decide.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Protocol

import numpy as np

from data_prep.groups import fallen, shared

BANDS, ROWS = 20, 6
PERMUTATIONS = BANDS * ROWS
_SHINGLE = 5
_SPREAD = 0.1  # by which an estimate may be too low: 2.7 standard deviations at a similarity of 0.8
_AT_HAND = 5_000  # texts whose runs are kept for the next comparison, some 10 kB each
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: the golden ratio in 64 bits

_VARIATION = range(0xFE00, 0xFE10)  # selectors of a sign's style


# Signs that tell "C#" from "C" and "5 %" from "5", though Unicode has them among the punctuation.
_TELLING = "#%&@‰"
_DECORATION = "|~"  # lines of tables, though symbols of mathematics


def _inside() -> str:
    r"""Ranges of what \w excludes though texts differ by it: vowel signs, points, accents (M), symbols (Sc, Sm, So)."""
    codes = (
        code
        for code in range(0x24, 0x20000)
        if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me", "Sc", "Sm", "So")
        and code not in _VARIATION
        and chr(code) not in _DECORATION
    )
    runs = (list(run) for _, run in groupby(enumerate(codes), key=lambda one: one[1] - one[0]))
    return "".join(rf"\U{run[0][1]:08x}-\U{run[-1][1]:08x}" for run in runs)


_BETWEEN_WORDS = re.compile(rf"[^\w{_inside()}{_TELLING}]+|_+")
_BETWEEN_ASCII = re.compile(rf"[^a-z0-9$+<=>{_TELLING}]+")  # the same for ASCII, at less than half the cost
# Signs of arithmetic, which are punctuation elsewhere: "-5", "10/5", "10 - 5", and 5² is not 52.
_ARITHMETIC = re.compile(r"[-*/^](?=\d)(?<![^\d\s(=].)|[-*/^](?= \d)(?<=\d .)")
_AS_SYMBOLS = {"-": "−", "*": "×", "/": "÷", "^": "↑"}
_RAISED = re.compile(r"(?<=\w)(?=[²³¹⁰⁴-⁹])")
# Signs without a width (soft hyphens, marks of direction, breaks) are in one copy of a text and not in the other; the
# joiner of emoji (200D) says something.
_INVISIBLE = (0xAD, 0x200B, 0x200C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF)
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—−", "-")) | dict.fromkeys(_INVISIBLE, "")
_ARTICLES = re.compile(r"^(a|an|the|some)\s+")


def normalize_text(text: str) -> str:
    """The words of a text, for comparison. Texts of signs alone ("⁇") are kept.

    The corpus keeps a coarser rule (`corpus.items.normalized`), which its published figures rest on.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _RAISED.sub("↑", text)).translate(_DASHES)
    folded = _ARITHMETIC.sub(lambda sign: _AS_SYMBOLS[sign[0]], text.casefold())
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


def estimate(low: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of pairs, `[N]`, by the low bytes of their minima, `[N, PERMUTATIONS]`."""
    share: np.ndarray = (low == other).mean(axis=1)
    return (share - 1 / 256) / (1 - 1 / 256)  # low bytes agree by chance once in 256


def near_duplicates(
    found: Signed,
    *,
    similarity: float = 0.8,
    among: np.ndarray | None = None,
    text_of: Callable[[int], str] | None = None,
) -> np.ndarray:
    """For each of N texts the number of the earlier one that it falls to, `[N]` int64; its own if it stays.

    A text falls to an earlier one that stays if the Jaccard similarity of the two is at least `similarity`. Texts that
    share a group of minima are compared. What has fallen takes nothing with it: chains of neighbours do not collapse.

    Args:
        among: `[N]` bool, the texts that are compared; the others stay, and nothing falls to them.
        text_of: gives the text of a number, for the exact similarity; without it, the estimated one decides.
    """
    first = np.arange(len(found))
    alike = Comparison(found, found, similarity, text_of, text_of)
    for item, other in fallen(*_buckets(found, among), alike.first):
        first[item] = other
    return first


def alike_pairs(
    found: Signed, *, similarity: float, among: np.ndarray, text_of: Callable[[int], str]
) -> list[tuple[int, int]]:
    """All pairs (earlier, later) of texts whose Jaccard similarity is at least `similarity`; arguments as above."""
    pairs: list[tuple[int, int]] = []
    alike = Comparison(found, found, similarity, text_of, text_of)

    def collect(item: int, near: np.ndarray) -> int:
        pairs.extend((other, item) for other in alike.all(item, near))
        return -1

    for _ in fallen(*_buckets(found, among), collect):
        pass
    return pairs


def _buckets(found: Signed, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(texts, buckets), `[M]` int64 each: all that share a group of minima with another."""
    places = np.arange(len(found)) if among is None else np.flatnonzero(among)
    members, begin = [], 0
    for number in range(BANDS):
        items, buckets = shared(found.band(number)[places])
        members.append(np.stack([places[items], buckets + begin]))
        begin += len(items)
    texts, buckets = np.concatenate(members, axis=1)
    return texts, buckets


def match(
    texts: Signed,
    known: Signatures,
    *,
    similarity: float,
    text_of: Callable[[int], str] | None = None,
    known_text_of: Callable[[int], str] | None = None,
) -> np.ndarray:
    """For each of N texts the number of a known one that it nearly is, `[N]` int64; -1 if there is none.

    All that share a group of minima are compared; by exact similarity if both functions are given.
    """
    found = np.full(len(texts), -1)
    compared = Comparison(texts, known, similarity, text_of, known_text_of)
    candidates: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    for number in range(BANDS):
        order = np.argsort(known.bands[:, number], kind="stable")
        there, here = known.bands[order, number], texts.band(number)
        begins, ends = np.searchsorted(there, here, "left"), np.searchsorted(there, here, "right")
        for item in np.flatnonzero(ends > begins).tolist():
            candidates[item].append(order[begins[item] : ends[item]])
    for item, near in candidates.items():
        found[item] = compared.first(item, np.unique(np.concatenate(near)))
    return found


def matches(texts: Signatures, known: Signatures, *, similarity: float) -> np.ndarray:
    """Whether each of N texts is nearly a known one by the estimate, `[N]` bool."""
    found: np.ndarray = match(texts, known, similarity=similarity) >= 0
    return found


class Comparison:
    """Texts against others: by the estimate, and where functions give the texts, by their exact similarity."""

    def __init__(
        self,
        texts: Signed,
        others: Signed,
        similarity: float,
        text_of: Callable[[int], str] | None,
        other_text_of: Callable[[int], str] | None,
    ) -> None:
        self._texts, self._others, self._similarity = texts, others, similarity
        self._runs_of = text_of and lru_cache(_AT_HAND)(lambda number: _runs(text_of(number)))
        self._other_runs_of = (
            self._runs_of
            if other_text_of is text_of
            else other_text_of and lru_cache(_AT_HAND)(lambda number: _runs(other_text_of(number)))
        )

    def first(self, text: int, others: np.ndarray) -> int:
        """One of the `others` that the text is like, the likest by the estimate first; -1 if there is none."""
        return next(self.all(text, others), -1)

    def all(self, text: int, others: np.ndarray) -> Iterator[int]:
        """Those of the `others` that the text is like, the likest by the estimate first."""
        estimates = estimate(self._texts.low_of(np.array([text])), self._others.low_of(others))
        order = np.argsort(-estimates, kind="stable")
        exact = self._runs_of is not None and self._other_runs_of is not None
        least = self._similarity - (_SPREAD if exact else 0)
        for place in order[: int((estimates >= least).sum())]:
            other = int(others[place])
            if not exact:
                yield other
                continue
            one, two = self._runs_of(text), self._other_runs_of(other)  # type: ignore[misc]
            both = len(one & two)
            if both >= self._similarity * (len(one) + len(two) - both):
                yield other


def _runs(text: str) -> frozenset[int]:
    """The runs of five characters of a text, by their hashes."""
    return frozenset(_shingles([text])[0].tolist())


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
