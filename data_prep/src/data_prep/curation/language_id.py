"""Language identification among the thirty languages.

Three witnesses: the script, which rules out most; py3langid (naive Bayes over bytes), which is quick; and lingua
(n-gram models), which is asked where py3langid is not sure, and for Danish, Norwegian and Swedish.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter, defaultdict
from typing import Any

from data_prep.curation.scandinavian import contradictions
from data_prep.errors import needs
from data_prep.languages import LANGUAGES

_SCANDINAVIAN = ("da", "no", "sv")  # which py3langid confuses
# Languages of py3langid that share the probability with one of the thirty: its dialects, and Malay with Indonesian; and
# with each other: Croatian, Bosnian and Serbian, each of them unlikely alone.
_VARIANTS = {"wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "ms": "id", "nn": "no", "bs": "hr", "sr": "hr"}
# By the first word of a character's name in Unicode.
_SCRIPTS = {
    "CJK": ("zh",), "HIRAGANA": ("ja",), "KATAKANA": ("ja",), "HANGUL": ("ko",), "THAI": ("th",), "GEORGIAN": ("ka",),
    "GREEK": ("el",), "BENGALI": ("bn",), "DEVANAGARI": ("hi",), "ARABIC": ("ar", "ur"), "CYRILLIC": ("ru", "uk"),
}  # fmt: skip
_LATIN = tuple(code for code in LANGUAGES if not any(code in codes for codes in _SCRIPTS.values()))
# Fewer letters are no evidence: one word often exists in several languages, and a Japanese name in kanji alone is
# written like a Chinese one.
MIN_LETTERS = 12
_SURE = 0.9  # of py3langid, below which lingua is asked
_PERHAPS = 0.5  # below which the agreement of lingua does not help: short texts in a kindred language
_CLEAR = 0.62  # lingua's confidence that counts as sure
_ONE_OF_THREE = 0.5  # py3langid's probability for the Scandinavian languages together, with which spelling decides
_LONG = 30  # letters from which on it is enough that both tend to the same of the three, if their spelling is the same
_TENDENCY = (0.55, 0.6)  # of lingua and of py3langid among the three; of shorter texts _SHORT
_SHORT = (0.55, 0.8)
_WORDS = 2  # that speak for a language against lingua


def identify(text: str, *, among_all: bool = False) -> tuple[str, float]:
    """The likeliest of the thirty languages and its probability.

    The probability is py3langid's among the languages of the text's script, its variants counted with them; `_SURE` at
    least if lingua, asked where it is less, finds the same.

    Args:
        among_all: for texts of unknown origin: also consider the other languages that py3langid knows. If one of them
            is likely, or if there are too few letters, the answer is "und" with a probability of 0.

    Raises:
        UserError: py3langid or lingua is not installed.
    """
    script, count = _script(text)
    codes = _SCRIPTS.get(script, _LATIN)
    if among_all and count < (3 if len(codes) == 1 and script != "CJK" else MIN_LETTERS):
        return "und", 0.0
    ranked: defaultdict[str, float] = defaultdict(float)
    for code, share in _langid().rank(text):
        ranked[_VARIANTS.get(code, code)] += float(share)
    if among_all and max(share for code, share in ranked.items() if code not in LANGUAGES) > 0.5:
        return "und", 0.0
    together = sum(ranked[code] for code in codes)
    best = max(codes, key=lambda code: ranked[code])
    probability = ranked[best] / together if together else 1 / len(codes)
    if best in _SCANDINAVIAN:
        return _scandinavian(text, {code: ranked[code] / together for code in _SCANDINAVIAN})
    if _PERHAPS <= probability < _SURE and _code(_lingua(codes).detect_language_of(text)) == best:
        return best, _SURE
    return best, probability


def letters(text: str) -> int:
    """The number of letters in a text, of any script, without digits, marks and signs."""
    return sum(character.isalpha() for character in text)


def _script(text: str) -> tuple[str, int]:
    """(the script of most letters, how many there are). Where there is some kana, kanji count as Japanese."""
    counts = Counter(unicodedata.name(one, "?").partition(" ")[0] for one in text if one.isalpha())
    kana = counts["HIRAGANA"] + counts["KATAKANA"]
    if kana >= 2 and 10 * kana >= counts["CJK"]:
        counts["HIRAGANA"] = kana + counts.pop("CJK", 0)
    return counts.most_common(1)[0] if counts else ("", 0)


def _scandinavian(text: str, ranked: dict[str, float]) -> tuple[str, float]:
    """The one of the three of which the spelling of most words speaks, else lingua's choice; `ranked` is py3langid's.

    Spelling is sure if lingua's choice is the same, or it is not sure itself, or there are `_WORDS` such words. Without
    it py3langid has to agree, and one of them to be sure enough.
    """
    values = _lingua(_SCANDINAVIAN).compute_language_confidence_values(text)
    likeliest, clear = _code(values[0].language), values[0].value >= _CLEAR
    together, against = sum(ranked.values()), contradictions(text)
    best, second, _ = sorted(against, key=lambda code: against[code])
    margin = against[second] - against[best]
    if not margin:
        least = _TENDENCY if letters(text) >= _LONG else _SHORT
        tend = values[0].value >= least[0] and ranked[likeliest] >= least[1] * together > least[1] * _ONE_OF_THREE
        agreed = ranked[likeliest] == max(ranked.values()) and against[likeliest] == against[best]
        if agreed and tend:
            return likeliest, max(_SURE, together)
        return likeliest, together if agreed and clear else together * _PERHAPS
    agreed = together > _ONE_OF_THREE and (likeliest == best or margin >= _WORDS or not clear)
    return best, max(_SURE, together) if agreed else together * _PERHAPS


def _code(language: Any) -> str:
    """Of a language of lingua, or None."""
    code: str = language.iso_code_639_1.name.lower() if language else "und"
    return "no" if code == "nb" else code


@functools.cache
def _langid() -> Any:
    langid = needs("py3langid.langid", extra="languages", what="telling languages apart")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@functools.cache
def _lingua(codes: tuple[str, ...]) -> Any:
    lingua = needs("lingua", extra="languages", what="telling languages apart")
    known = [language for language in lingua.Language.all() if _code(language) in codes]
    return lingua.LanguageDetectorBuilder.from_languages(*known).build()
