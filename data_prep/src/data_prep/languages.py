"""The thirty languages of the paper, by their ISO 639-1 codes, and what others call them."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

LANGUAGES = tuple(
    "ar bn zh da nl en fi fr ka de el hi id it ja ko lv no pl pt ro ru sk es sv th tr uk ur vi".split()  # noqa: SIM905
)

# The locales of Debian's packages that are "no", "zh" and "pt" here; others of these languages are left out.
OTHER_CODES = {"nb": "no", "zh_CN": "zh", "pt_BR": "pt"}

# In the order of LANGUAGES, in English and as its speakers call it.
_NAMES = (
    "arabic bengali chinese danish dutch english finnish french georgian german greek hindi indonesian italian "
    "japanese korean latvian norwegian polish portuguese romanian russian slovak spanish swedish thai turkish "
    "ukrainian urdu vietnamese"
)
_OWN_NAMES = (
    "العربية বাংলা 中文 dansk nederlands english suomi français ქართული deutsch ελληνικά हिन्दी bahasa italiano 日本語 "
    "한국어 latviešu norsk polski português română русский slovenčina español svenska ไทย türkçe українська اردو "
    "tiếngviệt"
)
# What langcodes leaves as it is: written standards and spoken variants of one of the thirty, names, and countries'
# codes where they are no language's.
_MORE = {
    **dict(zip(_NAMES.split(), LANGUAGES, strict=True)),
    **dict(zip(_OWN_NAMES.split(), LANGUAGES, strict=True)),
    **dict.fromkeys(("nb", "nn", "bokmål", "bokmal", "nynorsk"), "no"),
    **dict.fromkeys("yue wuu hak nan gan hsn cdo cjy lzh mandarin cantonese 汉语 漢語 zhs zht".split(), "zh"),  # noqa: SIM905
    **dict.fromkeys("acm acq aeb afb ajp apc ars ary arz ayl".split(), "ar"),  # noqa: SIM905
    "jp": "ja",
    "cn": "zh",
    "gr": "el",
    "dk": "da",
    "ua": "uk",
    "vn": "vi",
    "bangla": "bn",
    "flemish": "nl",
    "castilian": "es",
    "simple": "en",  # Wikipedia's
}
# How a missing value is written; "nan", a missing number to pandas, is also the code of Min Nan.
_NOTHING = {"unknown", "unk", "none", "null", "nan", "na", "n/a", "undefined", "undetermined", "default", "x-default"}
# What stands beside a name and says which kind of the language: "Chinese (Simplified)", "Brazilian Portuguese".
_KINDS = {
    *("simplified", "traditional", "mandarin", "cantonese", "classical", "modern", "standard", "han", "latin"),
    *("american", "british", "brazilian", "european", "canadian", "mexican", "bokmål", "bokmal", "nynorsk"),
    *("brazil", "portugal", "spain", "mexico", "china", "taiwan", "us", "uk", "gb", "indonesia", "language"),
}


@cache
def house_language(code: str) -> str:
    """The ISO 639-1 code, or where there is none the 639-3 code, of what others write: en-US, zh_Hant, deu_Latn, nb,
    French, __label__fr; "und" for none, null, unknown and the like. What is no code of a language is returned as it
    is."""
    if code in LANGUAGES:
        return code
    plain = unicodedata.normalize("NFKC", code).strip("\ufeff \t\r\n\"'()[]").lower()
    plain = re.split(r"[.@;]", re.sub(r"^(__label__|lang[_-])", "", plain))[0]  # pt_BR.UTF-8, de_DE@euro, en;q=0.9
    if plain in _NOTHING:
        return "und"
    if plain in LANGUAGES or plain.replace(" ", "") in _MORE:
        return _MORE.get(plain.replace(" ", ""), plain)
    words = [word for word in re.split(r"[\s_()-]+", plain) if word]
    named = {_MORE[word] for word in words if len(word) > 3 and word in _MORE}
    if len(named) == 1 and all(word in _KINDS or _MORE.get(word) in named for word in words):
        return named.pop()
    from langcodes import Language  # only where it is needed: most data say it as the house does

    try:
        language = Language.get(plain)
    except ValueError:
        return words[0] if len(words) > 1 and words[0] in LANGUAGES and words[1] in _KINDS else code
    region = len(words) == 2 and (words[0] == words[1] or words == ["en", "uk"])  # ja_JA, en-UK
    if (
        len(words) == 2
        and not region
        and words[1] in LANGUAGES
        and not Language.make(territory=words[1].upper()).is_valid()
    ):
        return code  # de-en: two languages
    own, whole = language.language or code, language.prefer_macrolanguage().language
    return _MORE.get(own, whole if whole in LANGUAGES else own)


@cache
def is_code(name: str) -> bool:
    """Whether a name is that of a language, as a key of texts by language is, and not "alt", "raw" or "user"."""
    if house_language(name) in LANGUAGES:
        return True
    from langcodes import tag_is_valid

    return (len(name) == 2 or "_" in name or "-" in name) and tag_is_valid(name)
