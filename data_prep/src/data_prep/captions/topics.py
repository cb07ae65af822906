"""The topics of a sentence in thirty languages, by the phrases of `phrases.json`, where each has the same topics.

A phrase is looked for where a word begins, and is a whole word if it ends in a space; after a "*", in languages that
have no spaces, and in Arabic and Korean, whose words have particles around them, it is looked for anywhere.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import Path

from data_prep.shards.format import parse_json

_PHRASES = Path(__file__).parent / "phrases.json"
_INSIDE = {"zh", "ja", "ko", "th", "ar"}
_SENTENCE_END = re.compile(r"[.!?。！？؟।॥…۔;；\u037e\n]+")
_WINDOW = 150  # characters of Thai, which does not mark the end of a sentence
# Arabic is written with and without vowel signs and the hamza of an alef.
_ALIKE = str.maketrans(
    {**dict.fromkeys([0x0640, 0x0670, *range(0x064B, 0x0660)]), **dict.fromkeys(map(ord, "أإآٱ"), "ا"), ord("İ"): "i"}
)
_APOSTROPHE = re.compile(r"(?<=[\u0400-\u04ff])['’ʼ](?=[\u0400-\u04ff])")  # almost a letter in Ukrainian


def words(text: str) -> str:
    """Letters, their marks and digits in lower case, one space for anything between them."""
    text = _APOSTROPHE.sub("", unicodedata.normalize("NFC", text).translate(_ALIKE).casefold())
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


def phrases(language: str) -> dict[str, list[str]]:
    """Topic → its phrases in that language."""
    found: dict[str, list[str]] = parse_json(_PHRASES.read_bytes())[language]
    return found


@functools.cache
def _patterns(language: str) -> dict[str, re.Pattern[str]]:
    inside = "" if language in _INSIDE else " "
    found = {}
    for topic, listed in phrases(language).items():
        spaced = [
            ("" if one[0] == "*" else " " if one[0] == " " else inside) + words(one) + (" " if one[-1] == " " else "")
            for one in listed
        ]
        found[topic] = re.compile("|".join(map(re.escape, spaced)))
    return found


class Sentences:
    """The sentences of a text as `words`, with a space before and behind, and what they speak of."""

    def __init__(self, text: str, language: str) -> None:
        self.spaced = language not in _INSIDE
        self._patterns = _patterns(language)
        self.all = [f" {said} " for part in _SENTENCE_END.split(text) if (said := words(part))]
        if language == "th":  # windows that overlap by half
            whole, step = " ".join(self.all), _WINDOW // 2
            self.all = [whole[start : start + _WINDOW] for start in range(0, max(1, len(whole) - step), step)]

    def places(self, sentence: str, topic: str) -> list[tuple[int, int]]:
        """Where a sentence speaks of a topic."""
        return [found.span() for found in self._patterns[topic].finditer(sentence)]

    def has(self, sentence: str, *topics: str) -> bool:
        """Whether a sentence speaks of all of these topics."""
        return all(self._patterns[topic].search(sentence) for topic in topics)

    def any_of(self, *topics: str) -> bool:
        """Whether there is a sentence that speaks of all of these topics."""
        return any(self.has(sentence, *topics) for sentence in self.all)

    def begins(self, sentence: str, topic: str) -> str | None:
        """What a sentence begins with of a topic; None if it begins otherwise."""
        found = self._patterns[topic].match(sentence) or self._patterns[topic].match(sentence.lstrip())
        return found[0] if found else None
