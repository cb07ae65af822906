"""Text normalisation for comparisons: case, punctuation, spaces and a leading English article are ignored."""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

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
