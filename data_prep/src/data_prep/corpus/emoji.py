"""Emoji: pictures from the Noto font, names and keywords in thirty languages from CLDR, long texts about the flags."""

from __future__ import annotations

import re

from data_prep.corpus.cldr import Locale, World
from data_prep.corpus.items import ImageItem, normalized
from data_prep.languages import LANGUAGES
from data_prep.samples import Text, clean

_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_SIGNS = {"\u200d", "\ufe0f"}  # joiner and colour selector
_REGIONAL = {chr(0x1F1E6 + letter): chr(ord("A") + letter) for letter in range(26)}

# People, genders and hair make no other family, so they are removed from a sequence to find it.
_GENDERS = str.maketrans({"👨": "🧑", "👩": "🧑", "♂": None, "♀": None, "🦰": None, "🦱": None, "🦲": None, "🦳": None})
_PEOPLE = re.compile(
    r"\b(man|men|woman|women|person|people|boy|girl|child|mr|mrs|ms|mx|prince|princess|king|queen|bald"
    r"|(?:red|curly|white|blond) hair)\b"
)

# Between two facts in a long text.
_STOPS = {"zh": "。", "ja": "。", "hi": "। ", "bn": "। ", "ur": "۔ ", "th": " "}


def emoji_candidates(locales: dict[str, Locale]) -> tuple[list[str], dict[str, int]]:
    """The signs that have a name in all languages, without skin tones; and what was left out, by reason.

    CLDR names punctuation, too; only signs that the font can draw are emoji.
    """
    known = [
        found for found in sorted(set().union(*(locale.names for locale in locales.values()))) if not found.isascii()
    ]
    toned = [found for found in known if _TONES & set(found)]
    base = [found for found in known if not _TONES & set(found)]
    kept = [found for found in base if all(found in locale.names for locale in locales.values())]
    dropped = {"a skin tone of another emoji": len(toned), "no name in some language": len(base) - len(kept)}
    return kept, dropped


def emoji_item(
    emoji: str, png: bytes, *, order: int, group: tuple[str, ...], locales: dict[str, Locale], world: World | None
) -> ImageItem:
    """The item of one emoji; a country's flag gets its long texts from `world`, if that is given."""
    names = tuple(Text(locales[code].names[emoji], code, "name") for code in LANGUAGES)
    keywords = []
    for code in LANGUAGES:
        words = [
            word
            for word in locales[code].keywords.get(emoji, ())
            if normalized(word) != normalized(locales[code].names[emoji])
        ]
        if words:
            keywords.append(Text(locales[code].comma.join(words), code, "keywords", "human:joined"))
    country = flag_territory(emoji)
    if country is not None and world is not None:
        long, long_source = [_about(country, emoji, code, locales[code], world) for code in LANGUAGES], "flags"
    else:
        words_by_code = {text.language: text.text for text in keywords}
        long = [
            Text(_sentences(code, name.text, words_by_code[code]), code, "long", "human:joined")
            for code, name in zip(LANGUAGES, names, strict=True)
            if code in words_by_code
        ]
        long_source = "emoji"
    english = locales["en"].names[emoji]
    return ImageItem(
        name="emoji-" + "-".join(f"{ord(sign):x}" for sign in emoji),
        source="emoji",
        long_source=long_source,
        group=group,
        order=order,
        labels=(
            f"sequence:{_family_sequence(emoji)}",
            f"emoji:{_family_name(english)}",
            f"caption:{normalized(english)}",
        ),
        names=names,
        keywords=tuple(keywords),
        long=tuple(long),
        png=png,
    )


def flag_territory(emoji: str) -> str | None:
    """ "DE" of the German flag; None for everything that is no country's flag."""
    if len(emoji) == 2 and all(sign in _REGIONAL for sign in emoji):
        return "".join(_REGIONAL[sign] for sign in emoji)
    return None


def _family_sequence(emoji: str) -> str:
    merged = emoji.translate(_GENDERS)
    return "".join(sign for sign in merged if sign not in _SIGNS) or emoji


def _family_name(english: str) -> str:
    """The English name without the people in it: "woman astronaut" and "man astronaut" are one family."""
    return clean(_PEOPLE.sub(" ", english.casefold()).replace(":", " ").replace(",", " ")) or "people"


def _sentences(code: str, *facts: str) -> str:
    stop = _STOPS.get(code, ". ")
    return stop.join(fact.rstrip(".。।۔ ") for fact in facts if fact) + stop.rstrip()


def _about(country: str, emoji: str, code: str, locale: Locale, world: World) -> Text:
    """A text about a country in one language: its regions, currencies, languages and cities, by CLDR."""

    def listed(keys: tuple[str, ...], table: dict[str, str]) -> str:
        names = list(dict.fromkeys(table[key] for key in keys if key in table))
        return locale.comma.join(names)

    zones = world.zones.get(country, ())
    cities = {zone: zone.rpartition("/")[2].replace("_", " ") for zone in zones} if code == "en" else {}
    facts = (
        locale.names[emoji],
        listed((country, *world.regions.get(country, ())), locale.territories),
        listed(world.currencies.get(country, ()), locale.currencies),
        listed(world.languages.get(country, ()), locale.languages),
        listed(zones[:12], cities | locale.cities),
    )
    return Text(_sentences(code, *facts), code, "long", "human:joined")
