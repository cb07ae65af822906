"""Which of the thirty languages a text is in."""

from __future__ import annotations

import functools
from typing import Any

from data_prep.errors import needs
from data_prep.languages import LANGUAGES

# What naive Bayes over bytes confuses in short texts; lingua's n-gram models decide among these.
_SCANDINAVIAN = ("da", "no", "nn", "sv")
# Below so many letters there is little to tell by: one word is often good in several languages.
MIN_LETTERS = 12


def identify(text: str, *, among_all: bool = False) -> tuple[str, float]:
    """The likeliest language of a text and its probability, as py3langid gives them.

    Where that is Danish, Norwegian or Swedish, lingua decides which of the three, and the probability is py3langid's
    sum over them. A text of fewer than `MIN_LETTERS` letters, in a script that several languages share, is no
    evidence.

    Args:
        among_all: among all languages that py3langid knows, not the thirty alone; for texts of unknown origin.

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
    """How many letters of any script a text has; digits, marks and signs say nothing of its language."""
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
