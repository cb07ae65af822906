"""What the form of an answer says in any language: a question, a cry, a title, a label, what leads to the caption."""

from __future__ import annotations

import re

_QUESTION = re.compile(
    r"[?？؟]|(?:ます|です|ません|でしょう|ました)か(?:[。\s]|$)|(?:ได้|ดี|ด้วย)ไหม|ไหม(?:คะ|ครับ|$)|หรือยัง"
)
_GREEK_QUESTION = re.compile(r"[;\u037e]")
_CRY = re.compile(r"\W*([^.!?。！？\n]+)[!！]+(?![\"'”»」』])\s*(\w?).{40}", re.DOTALL)
_MOST_CRIED = 8  # words; letters by threes in languages without spaces
_TITLE = re.compile(r"\s*[^\n]{1,60}\n\s*\n\s*\S")
_LEAD = re.compile(r"[^\n]+[:：][\s*_]*\n\s*(?![-*•·\d“«„\"「『]|“”)")
_COLON = re.compile(r"([^:：.!?。！？\n]+)[:：]\s*+(?!“”)")
# "Translation: …", "[Description] …", "… Language: English", "… [end]": around what is said, not of it.
_WORDS = r"[\w'’-]+(?: [\w'’-]+)"
_LABELLED = re.compile(
    rf"\s*[\[【][^\]】\n]{{1,40}}[\]】]|\s*{_WORDS}{{0,2}}\s?[:：]\s+(?!“”)\w|.*[\[【][^\]】\n]{{1,60}}[\]】]\s*$"
    rf"|.*[.!?。！？।۔]\s+{_WORDS}?[:：]\s*(?!“”)\S[^.\n]{{0,40}}(?:\.\d+)?\.?\s*$"
    rf"|.*[^:：\s]\s*\n\s*{_WORDS}{{0,2}}[:：](?!\s*“”)[^\n]*$",
    re.DOTALL,
)
_OPENING = 160  # characters
_MOST_LED = 8  # words before a colon


def asks(text: str, language: str) -> bool:
    """Whether there is a question in a text. Captions have none. Greek writes a semicolon for it."""
    return bool(_QUESTION.search(text) or (language == "el" and _GREEK_QUESTION.search(text)))


def cries(text: str, spaced: bool) -> bool:
    """Whether a text ends in "!", or begins with words, "!", and a sentence: not 'Sorry! is the name of a game'."""
    if text.rstrip("\"'”»」』)*_ \n")[-1:] in ("!", "！"):
        return True
    found = _CRY.match(text)
    if not found or found[2].islower():
        return False
    return (len(found[1].split()) if spaced else len(found[1]) / 3) <= _MOST_CRIED


def titled(text: str) -> bool:
    """Whether a text has a short first line with an empty one behind it, or one that ends in a colon before no list."""
    return bool(_TITLE.match(text) or _LEAD.match(text))


def labelled(text: str) -> bool:
    """Whether a text begins with a label, or ends with one and what it labels."""
    return bool(_LABELLED.match(text))


def leads(text: str) -> list[str]:
    """The few words before each colon at the beginning of a text, unless a quotation follows: a sign may read so."""
    return [found[1] for found in _COLON.finditer(text[:_OPENING]) if len(found[1].split()) <= _MOST_LED]
