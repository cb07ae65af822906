"""Whether an answer is a caption.

Each fault has a name, which is the reason of rejection in the ledger:

malformed    no JSON, or not that of a chat completion
declined     the service declined the request (4xx)
refusal      the model refused: by its `refusal` field, the content filter, or how the text begins
truncated    `finish_reason` is "length"
empty        no text
length       too short or too long for a caption in this script
language     not the language asked for, as a whole or in one third
repetition   loops
duplicate    nearly the caption of another image (found later, over all captions: `duplicates.py`)
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from data_prep.captions.ledger import Usage
from data_prep.captions.texts import refusal_phrases
from data_prep.curation.language_id import identify
from data_prep.errors import UserError
from data_prep.samples import clean
from data_prep.shards.format import parse_json

_OPENING = 120  # characters; a refusal comes at the beginning
_UNSPACED = {"zh", "ja", "th"}  # no spaces between words
_ENDINGS = {"ko"}  # words take endings, so a phrase may be the beginning of a word
_SENTENCE_END = re.compile(r"[.!?。！？\n]")
# Captions in these scripts need fewer characters.
_DENSITY = {"zh": 0.3, "ja": 0.4, "ko": 0.45}
_REPEATED = 0.3  # share of 20-character windows that occurred before; prose has a few percent
_THIRDS_FROM = 300  # characters; below that, a third is too little to tell a language by
_SURE = 0.95


@dataclass(frozen=True)
class Limits:
    """Characters of a caption. Chinese, Japanese and Korean need only 0.3 to 0.45 of `shortest`."""

    shortest: int = 200
    longest: int = 6000

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= self.longest:
            raise UserError(f"captions of {self.shortest} to {self.longest} characters: expected 0 or more, and room")


@dataclass(frozen=True)
class Verdict:
    """A caption or the reason of its rejection, and the metadata of the answer."""

    caption: str | None
    reason: str | None
    usage: Usage


def judge(raw: bytes, language: str, limits: Limits = Limits()) -> Verdict:
    """Judge the bytes of a 200 answer to a request in `language`."""
    answer: Any = None
    try:
        answer = parse_json(raw)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        if not isinstance(text, str | None):
            raise TypeError("content is no text")
        (text or "").encode()  # or ValueError: half a character could not be stored
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Verdict(None, "malformed", _usage(answer))
    caption = clean(text or "")
    reason = "refusal" if refusal or finish == "content_filter" else None
    reason = reason or ("truncated" if finish == "length" else None) or fault(caption, language, limits)
    return Verdict(None if reason else caption, reason, _usage(answer))


def fault(caption: str, language: str, limits: Limits) -> str | None:
    """The fault of a caption, by its text alone; None if there is none."""
    if not caption:
        return "empty"
    if refuses(caption, language):
        return "refusal"
    density = _DENSITY.get(language, 1.0)
    if not limits.shortest * density <= len(caption) <= limits.longest:
        return "length"
    if repeated(caption) > _REPEATED:
        return "repetition"
    if not in_language(caption, language):
        return "language"
    return None


def refuses(text: str, language: str) -> bool:
    """Whether a text opens with a refusal: by whole words, or by sentence beginnings where words have no spaces.

    So "en voi" (I cannot) is not found in "punaisen voimakas", nor a Japanese "cannot" at the end of a sentence.
    """
    phrases = tuple(_words(phrase) for phrase in refusal_phrases(language))
    if language in _UNSPACED:
        return any(_words(sentence).startswith(phrases) for sentence in _SENTENCE_END.split(text[:_OPENING]))
    opening, end = f" {_words(text)} "[:_OPENING], "" if language in _ENDINGS else " "
    return any(f" {phrase}{end}" in opening for phrase in phrases)


def _words(text: str) -> str:
    """Letters, their marks and digits in lower case; one space for anything between them."""
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.casefold()).split())


def repeated(text: str, width: int = 20) -> float:
    """The share of a text's windows of `width` characters that occurred in it before."""
    windows = max(1, len(text) - width + 1)
    return 1 - len({text[start : start + width] for start in range(windows)}) / windows


def in_language(text: str, language: str) -> bool:
    """Whether a text as a whole is in a language, and no third of a longer text clearly in another."""
    if identify(text)[0] != language:
        return False
    if sum(2 if unicodedata.east_asian_width(c) == "W" else 1 for c in text) < _THIRDS_FROM:
        return True
    third = len(text) // 3
    found = [identify(text[start * third : (start + 1) * third]) for start in range(3)]
    return not any(other != language and probability >= _SURE for other, probability in found)


def _usage(answer: object) -> Usage:
    """Model, fingerprint and token counts of an answer, where it has them."""
    if not isinstance(answer, dict):
        return Usage()
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Usage(
        model=_text(answer.get("model")),
        fingerprint=_text(answer.get("system_fingerprint")),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _text(value: object) -> str | None:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _count(value: object) -> int | None:
    """A number of tokens; none that SQLite or a sum of costs could not hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
