"""Language identification among the thirty languages."""

from __future__ import annotations

import functools
from typing import Any

from data_prep.errors import needs
from data_prep.languages import LANGUAGES

# py3langid (naive Bayes over bytes) confuses these in short texts; lingua's n-gram models tell them apart.
_SCANDINAVIAN = ("da", "no", "nn", "sv")
# Fewer letters are no evidence: one word often exists in several languages.
MIN_LETTERS = 12


def identify(text: str, *, among_all: bool = False) -> tuple[str, float]:
    """The likeliest language of a text and its probability, as py3langid gives them.

    Where that is Danish, Norwegian or Swedish, lingua decides which of the three, and the probability is py3langid's
    sum over them. A text of fewer than `MIN_LETTERS` letters is no evidence where several languages share the
    script.

    Args:
        among_all: consider all languages of py3langid instead of the thirty; for texts of unknown origin.

    Raises:
        UserError: py3langid or lingua is not installed.
    """
    ranked = dict(_langid(among_all).rank(text))
    best = max(ranked, key=ranked.__getitem__)
    if best not in _SCANDINAVIAN:
        return best, ranked[best]
    together = sum(ranked.get(language, 0.0) for language in _SCANDINAVIAN)
    found = _lingua().detect_language_of(text)
    code = "nb" if found is None else found.iso_code_639_1.name.lower()
    return ("no" if code == "nb" else code), together


def letters(text: str) -> int:
    """The number of letters in a text, of any script, without digits, marks and signs."""
    return sum(character.isalpha() for character in text)


@functools.cache
def _langid(among_all: bool) -> Any:
    langid = needs("py3langid.langid", extra="languages", what="telling languages apart")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if not among_all:
        identifier.set_languages(LANGUAGES)
    return identifier


@functools.cache
def _lingua() -> Any:
    lingua = needs("lingua", extra="languages", what="telling Danish, Norwegian and Swedish apart")
    three = (lingua.Language.DANISH, lingua.Language.BOKMAL, lingua.Language.SWEDISH)
    return lingua.LanguageDetectorBuilder.from_languages(*three).build()
