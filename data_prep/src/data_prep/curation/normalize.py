"""What makes no difference between two texts: case, punctuation, spaces, an English article in front."""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

_VARIATION = range(0xFE00, 0xFE10)  # selectors: how a sign is drawn, not which one it is


def _marks() -> str:
    r"""Vowel signs, points and accents (category M), as ranges; \w leaves them out, though they make words differ."""
    found = [
        code
        for code in range(0x300, 0x20000)
        if unicodedata.category(chr(code)).startswith("M") and code not in _VARIATION
    ]
    runs = (list(run) for _, run in groupby(enumerate(found), key=lambda one: one[1] - one[0]))
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


_BETWEEN_WORDS = re.compile(rf"[^\w{_marks()}]+|_+")
_BETWEEN_ASCII = re.compile(r"[\W_]+")  # the same where there are no marks, at less than half the cost
_ARTICLES = re.compile(r"^(a|an|the|some)\s+")


def normalize_text(text: str) -> str:
    """The words of a text, to be compared. A text of signs alone ("⁇") stays as it is.

    The corpus has a rule of its own (`corpus.items.plain`), which tells fewer texts apart; its figures are published.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    between = _BETWEEN_ASCII if folded.isascii() else _BETWEEN_WORDS
    words = " ".join(between.sub(" ", folded).split())
    return _ARTICLES.sub("", words) or folded
