"""Whether an answer is a caption.

Each fault has a name, which is the reason of rejection in the ledger:

malformed    no JSON, or not that of a chat completion
declined     the service declined the request (4xx)
refusal      the model refused, or says that there is no image: by its `refusal` field, the content filter, or its words
truncated    `finish_reason` is "length", or a sibling of that
unfinished   `finish_reason` is another one than "stop", or missing
thoughts     the model's thoughts without an end, or without tags; thoughts in tags before the caption are cut off
markup       tokens of a chat template, roles, tags, headings, JSON, broken bytes
prompt       a part of the prompt
chatter      said to the user: "Sure! Here is …", a label, offers of help
empty        no text
length       too short or too long for a caption in this script
language     not the language asked for, as a whole or in one third
repetition   loops
duplicate    nearly the caption of another image (found later, over all captions: `duplicates.py`)
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.captions.answer import read_answer
from data_prep.captions.markup import has_markup, without_thoughts
from data_prep.captions.request import Usage
from data_prep.captions.talk import repeats, talk
from data_prep.curation.language_id import identify
from data_prep.errors import UserError
from data_prep.samples import clean

# Captions in these scripts need fewer characters.
_DENSITY = {"zh": 0.3, "ja": 0.4, "ko": 0.45}
_REPEATED = 0.3  # share of 20-character windows that occurred before; prose has a few percent
_THIRDS_FROM = 300  # characters; below that, a third is too little to tell a language by
_SURE = 0.95
_FAR_TOO_LONG = 4  # times as long as a caption may be: loops up to the last token
_RULES = ("judge.py", "answer.py", "markup.py", "talk.py", "layout.py", "topics.py", "phrases.json")
_RULES_OF_LANGUAGES = ("language_id.py", "scandinavian.py")


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


@functools.cache
def rules() -> int:
    """A number that says by which rules this version judges: any change of their files makes another one."""
    here = Path(__file__).parent
    files = [*(here / name for name in _RULES), *(here.parent / "curation" / name for name in _RULES_OF_LANGUAGES)]
    return int(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8], 16)


def judge(raw: bytes, language: str, limits: Limits = Limits(), *, prompts: Sequence[str] = ()) -> Verdict:
    """Judge the bytes of a 200 answer in `language` to one of `prompts`."""
    answer = read_answer(raw)
    text = without_thoughts(answer.text or "")
    reason = answer.fault or ("thoughts" if text is None else fault(text, language, limits, prompts))
    return Verdict(None if reason else clean(text or ""), reason, answer.usage)


def fault(text: str, language: str, limits: Limits, prompts: Sequence[str] = ()) -> str | None:
    """The fault of a caption, by its text alone, with the lines that it came in; None if there is none."""
    if len(text) > _FAR_TOO_LONG * limits.longest:  # before anything that takes a second for each megabyte
        return "length"
    caption = clean(text)
    density = _DENSITY.get(language, 1.0)
    if not caption:
        return "empty"
    if has_markup(text):
        return "markup"
    if any(repeats(text, prompt, density) for prompt in prompts):
        return "prompt"
    if reason := talk(text, language):
        return reason
    if not limits.shortest * density <= len(caption) <= limits.longest:
        return "length"
    if repeated(caption) > _REPEATED:
        return "repetition"
    if not in_language(caption, language):
        return "language"
    return None


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
