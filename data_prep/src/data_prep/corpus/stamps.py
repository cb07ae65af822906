"""Tux Paint's stamps: photos and drawings with captions that volunteers wrote in many languages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_prep.corpus.cldr import Locale
from data_prep.corpus.deb import Package, read_members
from data_prep.corpus.items import ImageItem, normalized
from data_prep.corpus.render import RenderJob
from data_prep.languages import LANGUAGES, OTHER_CODES
from data_prep.samples import Text, clean

_ROOT = "usr/share/tuxpaint/stamps/"
_STYLES = {"cartoon", "plastic", "toys", "filled", "outlined", "uppercase", "lowercase"}
_VARIANT = re.compile(r"([-_ ]?\d+|[-_](mirror|flip|left|right|drawing|cartoon|filled|outlined|small|large|big))+$")

# CLDR's labels for some of the folders; added to the caption for the long text.
_FOLDER_LABELS = {
    "animals": "animal",
    "food": "food_drink",
    "household": "objects",
    "naturalforces": "nature",
    "people": "person",
    "plants": "plant",
    "sports": "sport",
    "symbols": "symbols",
    "town": "place",
    "vehicles": "travel",
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """A stamp: its path without suffix, its captions by language, how to render it."""

    path: str
    captions: dict[str, str]
    job: RenderJob


def read_stamps(package: Package) -> tuple[list[Stamp], dict[str, int]]:
    """All stamps that have a picture and an English caption; and what was left out, by reason.

    Of a stamp that exists as bitmap and SVG the bitmap is used. Ready-made mirror images have no captions of their own
    and are left out.
    """
    endings = (".txt", ".png", ".svg")
    files = read_members(package, lambda path: path.startswith(_ROOT) and path.endswith(endings))
    files = {path.removeprefix(_ROOT): data for path, data in files.items()}
    stems = sorted({path.rpartition(".")[0] for path in files})
    stamps, dropped = [], {"no caption (ready-made mirror images)": 0, "caption without a picture": 0}
    for stem in stems:
        captions = read_captions(files.get(f"{stem}.txt", b""))
        if "en" not in captions:
            dropped["no caption (ready-made mirror images)"] += 1
        elif f"{stem}.png" in files:
            stamps.append(Stamp(stem, captions, RenderJob("bitmap", files[f"{stem}.png"])))
        elif f"{stem}.svg" in files:
            stamps.append(Stamp(stem, captions, RenderJob("svg", files[f"{stem}.svg"])))
        else:
            dropped["caption without a picture"] += 1
    return stamps, dropped


def read_captions(data: bytes) -> dict[str, str]:
    """Captions by our language code: the first line is English, then come lines such as "de.utf8=Ein Frosch."."""
    lines = data.decode("utf-8", errors="replace").splitlines()
    captions: dict[str, str] = {}
    if lines and (english := clean(lines[0])):
        captions["en"] = english
    others: dict[str, str] = {}
    for line in lines[1:]:
        code, found, text = line.partition(".utf8=")
        if not found or not (text := clean(text)):
            continue
        if code in LANGUAGES and code != "en":
            captions[code] = text
        elif code in OTHER_CODES:
            others[OTHER_CODES[code]] = text
    return others | captions  # European Portuguese takes precedence over Brazilian


def stamp_item(stamp: Stamp, png: bytes, *, order: int, locales: dict[str, Locale]) -> ImageItem:
    """The item of one stamp."""
    path = PurePosixPath(stamp.path)
    names, long = [], []
    for code in LANGUAGES:
        if code not in stamp.captions:
            continue
        caption = stamp.captions[code]
        names.append(Text(caption, code, "name"))
        label = locales[code].labels.get(_FOLDER_LABELS.get(path.parts[0], "")) if code in locales else None
        joined = Text(f"{caption} ({label})", code, "long", "human:joined")
        long.append(joined if label else Text(caption, code, "long"))
    return ImageItem(
        name="stamp-" + re.sub(r"[^A-Za-z0-9_-]", "_", stamp.path.replace("/", "--")),
        source="stamps",
        long_source="stamps",
        group=path.parts[:-1],
        order=order,
        labels=(f"stamp:{family_path(stamp.path)}", f"caption:{normalized(stamp.captions['en'])}"),
        names=tuple(names),
        keywords=(),
        long=tuple(long),
        png=png,
    )


def family_path(path: str) -> str:
    """The path of a stamp without what tells variants apart: style folder, number, side, mirror mark."""
    parts = path.split("/")
    folders = [part for part in parts[:-1] if part not in _STYLES]
    return "/".join([*folders, _VARIANT.sub("", parts[-1].casefold()) or parts[-1].casefold()])
