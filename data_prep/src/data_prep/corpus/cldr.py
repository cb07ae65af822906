"""Unicode's Common Locale Data Repository: names of emoji, countries, languages, currencies and cities.

What reads its files raises ValueError or LookupError where they are others than CLDR's; `debian` names the package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from data_prep.corpus.deb import Package, parse_xml, read_members
from data_prep.errors import UserError
from data_prep.languages import LANGUAGES
from data_prep.samples import clean

_ROOT = "usr/share/unicode/cldr/common/"
_SHARED = ("collation/root.xml", "properties/labels.txt", "supplemental/supplementalData.xml", "bcp47/timezone.xml")


@dataclass(frozen=True, slots=True)
class Locale:
    """The names in one language; keys as in CLDR (no U+FE0F in emoji)."""

    names: dict[str, str] = field(default_factory=dict)
    keywords: dict[str, tuple[str, ...]] = field(default_factory=dict)
    territories: dict[str, str] = field(default_factory=dict)
    languages: dict[str, str] = field(default_factory=dict)
    currencies: dict[str, str] = field(default_factory=dict)
    cities: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    comma: str = ", "


def read_files(package: Package) -> dict[str, bytes]:
    """The files that we need, by their path below `common/`."""
    folders = ("annotations", "annotationsDerived", "main")
    wanted = {_ROOT + f"{folder}/{language}.xml" for folder in folders for language in LANGUAGES}
    wanted |= {_ROOT + path for path in _SHARED}
    files = read_members(package, wanted.__contains__)
    lacking = sorted(wanted - files.keys())
    if lacking:
        raise UserError(f"{package.path}: has no {lacking[0]}; version 41 has it, use that one or a newer")
    return {path.removeprefix(_ROOT): data for path, data in files.items()}


def read_locale(files: dict[str, bytes], language: str) -> Locale:
    """Everything that the corpus takes from one language's files."""
    main = parse_xml(files[f"main/{language}.xml"])
    middle = main.findtext("listPatterns/listPattern/listPatternPart[@type='middle']") or "{0}, {1}"
    locale = Locale(comma=middle.replace("{0}", "").replace("{1}", ""))
    for folder in ("annotations", "annotationsDerived"):
        for element in parse_xml(files[f"{folder}/{language}.xml"]).iter("annotation"):
            text = clean(element.text or "")
            if not text or "↑" in text:  # "↑↑↑": the same as in the parent language
                continue
            if element.get("type") == "tts":
                locale.names[element.attrib["cp"]] = text
            else:
                locale.keywords[element.attrib["cp"]] = tuple(clean(word) for word in text.split("|"))
    for table, path, name in (
        (locale.territories, "localeDisplayNames/territories/territory", "."),
        (locale.languages, "localeDisplayNames/languages/language", "."),
        (locale.labels, "characterLabels/characterLabel", "."),
        (locale.currencies, "numbers/currencies/currency", "displayName"),
        (locale.cities, "dates/timeZoneNames/zone", "exemplarCity"),
    ):
        for element in main.iterfind(path):
            found = element.findtext(name)
            if found and element.get("alt") is None and "↑" not in found:
                table[element.attrib["type"]] = clean(found)
    return locale


def emoji_order(files: dict[str, bytes]) -> dict[str, int]:
    """Place of each emoji in Unicode's own order (smileys, people, animals, …), from the collation rules."""
    rules = files["collation/root.xml"].decode()
    start = rules.index("type='emoji'")
    rules = rules[rules.index("EMOJI ORDER", start) : rules.index("</collation>", start)]
    order: dict[str, int] = {}
    for line in rules.splitlines()[1:]:
        if line.startswith("<*"):
            found = list(line[2:].replace("\ufe0f", ""))
        elif line.startswith("<"):
            found = [part.strip() for part in re.split(r"<+|=", line) if part.strip()]
        else:
            continue
        for emoji in found:
            order.setdefault(emoji.replace("\ufe0f", ""), len(order))
    return order


def emoji_groups(files: dict[str, bytes]) -> dict[str, tuple[str, str]]:
    """(group, subgroup) of each emoji that labels.txt lists, e.g. ("Food & Drink", "food-fruit")."""
    groups: dict[str, tuple[str, str]] = {}
    for line in files["properties/labels.txt"].decode().splitlines():
        if not line.startswith("["):
            continue
        members, group, subgroup = (part.strip() for part in line.split(";"))
        for emoji in _expand(members):
            groups.setdefault(emoji.replace("\ufe0f", ""), (group, subgroup))
    return groups


@dataclass(frozen=True, slots=True)
class World:
    """CLDR's data on countries; keys are two-letter territories."""

    regions: dict[str, tuple[str, ...]]  # from near to far, as codes: ("155", "150")
    currencies: dict[str, tuple[str, ...]]  # in use today
    languages: dict[str, tuple[str, ...]]  # official, or spoken by 5 %; the most spoken first
    zones: dict[str, tuple[str, ...]]  # time zones, in order of their codes


def read_world(files: dict[str, bytes]) -> World:
    """Regions, currencies, languages and time zones of all territories."""
    data = parse_xml(files["supplemental/supplementalData.xml"])
    parents: dict[str, str] = {}
    for group in data.iterfind("territoryContainment/group"):
        if group.get("status") is None:
            for child in group.attrib["contains"].split():
                parents.setdefault(child, group.attrib["type"])
    currencies = {
        region.attrib["iso3166"]: tuple(
            currency.attrib["iso4217"]
            for currency in region.iterfind("currency")
            if currency.get("to") is None and currency.get("tender") != "false"
        )
        for region in data.iterfind("currencyData/region")
    }
    languages: dict[str, tuple[str, ...]] = {}
    for territory in data.iterfind("territoryInfo/territory"):
        spoken = [
            (-float(entry.attrib["populationPercent"]), entry.attrib["type"])
            for entry in territory.iterfind("languagePopulation")
            if float(entry.attrib["populationPercent"]) >= 5 or "official" in entry.get("officialStatus", "")
        ]
        languages[territory.attrib["type"]] = tuple(code for _, code in sorted(spoken)[:8])
    zones: dict[str, list[str]] = {}
    for zone in parse_xml(files["bcp47/timezone.xml"]).iter("type"):
        alias = zone.get("alias", "").split()
        if alias and "/" in alias[0] and zone.get("deprecated") is None:
            zones.setdefault(zone.attrib["name"][:2].upper(), []).append(alias[0])
    regions: dict[str, tuple[str, ...]] = {}
    for code in parents:
        chain, above = [], parents.get(code)
        while above is not None and above != "001":
            chain.append(above)
            above = parents.get(above)
        regions[code] = tuple(chain)
    return World(regions, currencies, languages, {code: tuple(found) for code, found in zones.items()})


def _expand(unicode_set: str) -> list[str]:
    """The members of a flat UnicodeSet such as "[☺😀-😆{👨‍⚕️}]"."""
    found: list[str] = []
    rest = unicode_set.strip("[]")
    while rest:
        if rest[0] == "{":
            end = rest.index("}")
            found.append(rest[1:end])
            rest = rest[end + 1 :]
        elif rest[0] == "-" and found and len(rest) > 1:
            found.extend(chr(code) for code in range(ord(found[-1]) + 1, ord(rest[1]) + 1))
            rest = rest[2:]
        else:
            found.append(rest[0])
            rest = rest[1:]
    return found
