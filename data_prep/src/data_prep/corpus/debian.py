"""The real corpus: from a folder of packages to items."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_prep.corpus import apt, cldr, emoji, handbook, stamps, text_items
from data_prep.corpus.deb import Package, file_sha256, find_package, find_translations, read_members
from data_prep.corpus.items import ImageItem, Settings, TextItem
from data_prep.corpus.render import RenderJob, render_images
from data_prep.errors import UserError
from data_prep.languages import LANGUAGES

Render = Callable[[Sequence[RenderJob]], list[bytes | None]]
Locales = dict[str, cldr.Locale]
Places = tuple[dict[str, int], dict[str, tuple[str, str]]]  # of each emoji: in the order, and its groups
Log = Callable[[str], None]

# Items in each held-out pool. The project's figures are measured on the image pools.
HELD_OUT = {"emoji": 240, "stamps": 138, "packages": 300, "help": 24, "handbook": 120}


@dataclass
class Material:
    """All items with their packages, and what was left out (source → reason → number)."""

    images: list[ImageItem] = field(default_factory=list)
    texts: list[TextItem] = field(default_factory=list)
    packages: list[dict[str, str]] = field(default_factory=list)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    fonts: dict[str, bytes] = field(default_factory=dict)


def needed_packages(without: Collection[str]) -> list[str]:
    """The packages for a corpus without these sources."""
    needed = [apt.FONT, apt.CLDR]
    if "stamps" not in without:
        needed.append(apt.STAMPS)
    if "help" not in without:
        needed += [apt.HELP, *handbook.PACKAGES]
    return needed


def read_material(directory: Path, settings: Settings, workers: int, log: Log) -> Material:
    """Read the packages and translations in `directory` and draw the pictures."""
    without = settings.without
    packages = _find_all(directory, without)
    material = Material(packages=[package.record() for package in packages.values()], held_out=HELD_OUT)
    material.left_out = dict.fromkeys(sorted(without), "asked for (--without)")

    started = time.monotonic()
    files = cldr.read_files(packages[apt.CLDR])
    try:
        locales = {code: cldr.read_locale(files, code) for code in LANGUAGES}
        world = None if "flags" in without else cldr.read_world(files)
        order, groups = cldr.emoji_order(files), cldr.emoji_groups(files)
    except (ValueError, LookupError) as error:
        raise UserError(
            f"{packages[apt.CLDR].path}: not CLDR as it should be ({error}); fetch the file again"
        ) from error
    log(f"read names in {len(locales)} languages ({time.monotonic() - started:.0f} s)")

    render = partial(render_images, size=settings.image_size, workers=workers)
    _add_emoji(material, (order, groups), locales, world, partial(render, font=_read_font(packages[apt.FONT])), log)
    if apt.STAMPS in packages:
        log("reading the stamps")
        _add_stamps(material, packages[apt.STAMPS], locales, partial(render, font=None), log)
    if "packages" not in without:
        _add_packages(material, directory, settings, log)
    if apt.HELP in packages:
        pages, material.dropped["help"] = text_items.read_help(packages[apt.HELP])
        log(f"read {len(pages)} help pages")
        material.texts += pages
        handbooks = [packages[name] for name in handbook.PACKAGES]
        sections, material.dropped["handbook"] = handbook.read_handbook(handbooks)
        log(f"read {len(sections)} sections of the handbook")
        material.texts += sections
    if (letters := find_package(directory, apt.LETTERS)) is not None:
        fonts = read_members(letters, lambda path: path.endswith("/DejaVuSans.ttf"))
        material.fonts = {Path(path).name: font for path, font in fonts.items()}
        material.packages.append(letters.record())
    return material


def _find_all(directory: Path, without: Collection[str]) -> dict[str, Package]:
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such folder; it should hold {', '.join(f'{name}_*.deb' for name in apt.PACKAGES)}"
        )
    packages = {name: find_package(directory, name) for name in needed_packages(without)}
    missing = [f"{name}_*.deb" for name, package in packages.items() if package is None]
    if missing:
        raise UserError(
            f"{directory}: lacks {' and '.join(missing)}; fetch from https://packages.debian.org/bookworm/NAME, leave "
            "their source out (`--without`), or pass `--drawn` for a corpus that needs no packages"
        )
    return {name: package for name, package in packages.items() if package is not None}


def _read_font(package: Package) -> bytes:
    fonts = read_members(package, lambda path: path.endswith("NotoColorEmoji.ttf"))
    if not fonts:
        raise UserError(f"{package.path}: holds no NotoColorEmoji.ttf")
    from PIL import features

    if not features.check("raqm"):
        raise UserError(
            "this Pillow has no Raqm and would draw flags as letters; take Pillow's own wheel (pip install -U pillow)"
        )
    return next(iter(fonts.values()))


def _add_emoji(
    material: Material, places: Places, locales: Locales, world: cldr.World | None, render: Render, log: Log
) -> None:
    found, dropped = emoji.emoji_candidates(locales)
    started = time.monotonic()
    pictures = render([RenderJob("glyph", sign.encode()) for sign in found])
    order, groups = places
    last_group: tuple[str, str] = ("", "")
    drawn = sorted(
        ((sign, png) for sign, png in zip(found, pictures, strict=True) if png is not None),
        key=lambda entry: (order.get(entry[0], len(order)), entry[0]),
    )
    for place, (sign, png) in enumerate(drawn):
        # labels.txt lacks the newest emoji; they get the group of the one before them in the order.
        last_group = groups.get(sign, last_group)
        item = emoji.emoji_item(sign, png, order=place, group=last_group, locales=locales, world=world)
        material.images.append(item)
    material.dropped["emoji"] = dropped | {"no picture in the font (punctuation and signs)": len(found) - len(drawn)}
    log(f"drew {len(drawn)} emoji ({time.monotonic() - started:.0f} s)")


def _add_stamps(material: Material, package: Package, locales: Locales, render: Render, log: Log) -> None:
    found, dropped = stamps.read_stamps(package)
    started = time.monotonic()
    pictures = render([stamp.job for stamp in found])
    items = [
        stamps.stamp_item(stamp, png, order=place, locales=locales)
        for place, (stamp, png) in enumerate(zip(found, pictures, strict=True))
        if png is not None
    ]
    material.images += items
    material.dropped["stamps"] = dropped | {"picture unreadable or white": len(found) - len(items)}
    log(f"drew {len(items)} stamps ({time.monotonic() - started:.0f} s)")


def _add_packages(material: Material, directory: Path, settings: Settings, log: Log) -> None:
    started = time.monotonic()
    translations = find_translations(directory)
    if "en" not in translations or len(translations) < 2:
        material.left_out["packages"] = "no Translation-en with another Translation-xx in the folder"
        log(f"{directory}: has no Translation-en with another Translation-xx; continuing WITHOUT package descriptions")
        return
    material.packages += [
        {"name": path.name, "sha256": file_sha256(path)} for paths in translations.values() for path in paths
    ]
    limit, seed = settings.max_packages, settings.seed
    items, material.dropped["packages"] = text_items.read_packages(translations, limit=limit, seed=seed)
    material.texts += items
    log(f"read {len(items)} package descriptions in {len(translations)} languages ({time.monotonic() - started:.0f} s)")
