"""The thirty languages of the paper, by their ISO 639-1 codes, and what others call them."""

from __future__ import annotations

import re
from functools import cache

LANGUAGES = tuple(
    "ar bn zh da nl en fi fr ka de el hi id it ja ko lv no pl pt ro ru sk es sv th tr uk ur vi".split()  # noqa: SIM905
)

# The locales of Debian's packages that are "no", "zh" and "pt" here; others of these languages are left out.
OTHER_CODES = {"nb": "no", "zh_CN": "zh", "pt_BR": "pt"}

# In the order of LANGUAGES.
_NAMES = (
    "arabic bengali chinese danish dutch english finnish french georgian german greek hindi indonesian italian "
    "japanese korean latvian norwegian polish portuguese romanian russian slovak spanish swedish thai turkish "
    "ukrainian urdu vietnamese"
)
# What langcodes leaves as it is: written standards and spoken variants of one of the thirty, English names, and
# countries' codes where they are no language's.
_MORE = {
    **dict(zip(_NAMES.split(), LANGUAGES, strict=True)),
    **dict.fromkeys(("nb", "nn"), "no"),
    **dict.fromkeys(("yue", "wuu", "hak", "nan", "gan", "hsn", "cdo", "cjy", "lzh"), "zh"),
    **dict.fromkeys("acm acq aeb afb ajp apc ars ary arz ayl".split(), "ar"),  # noqa: SIM905
    "jp": "ja",
    "cn": "zh",
    "gr": "el",
    "dk": "da",
    "ua": "uk",
    "vn": "vi",
}


@cache
def house_language(code: str) -> str:
    """The ISO 639-1 code, or where there is none the 639-3 code, of what others write: en-US, zh_Hant, deu_Latn, nb,
    French. What is no code of a language is returned as it is."""
    if code in LANGUAGES:
        return code
    plain = re.split(r"[.@]", code.strip().lower())[0]  # pt_BR.UTF-8, de_DE@euro
    if plain in _MORE:
        return _MORE[plain]
    from langcodes import Language  # only where it is needed: most data say it as the house does

    try:
        language = Language.get(plain)
    except ValueError:
        return code
    own, whole = language.language or code, language.prefer_macrolanguage().language
    return _MORE.get(own, whole if whole in LANGUAGES else own)


@cache
def is_code(name: str) -> bool:
    """Whether a name is that of a language, as a key of texts by language is, and not "alt", "raw" or "user"."""
    if house_language(name) in LANGUAGES:
        return True
    from langcodes import tag_is_valid

    return (len(name) == 2 or "_" in name or "-" in name) and tag_is_valid(name)
