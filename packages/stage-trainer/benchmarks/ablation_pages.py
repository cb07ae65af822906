"""Pages for the ablation of resolution: help pages of the laptop corpus, rendered, with four figures among the text.

A page is a help page in one language: its title as a heading, its text below, and four emoji as figures, each a quarter
of the page's width. There are two kinds of queries: a figure's name, in six languages ("figures"), and the page's own
title ("titles"). Held-out pages are of help pages that training has not seen; their figures are of training's emoji, in
other places and company, as letters are known on a page that is new.
"""

from __future__ import annotations

import io
import json
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import Dataset, DatasetWriter
from PIL import Image, ImageDraw, ImageFont

SIZE = 180  # pixels; above the largest resolution that is trained
FIGURE = 44
FIGURES = 4
# Of the help pages' languages those that the corpus's font can write.
WRITTEN = ("da", "de", "el", "en", "es", "fi", "fr", "id", "it", "lv", "nl", "pl", "pt", "ro", "ru", "sv", "uk", "vi")
ASKED = ("ar", "de", "en", "es", "ru", "zh")
SETS = ("figures", "titles")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Page:
    """What stands on a page: `figures` are (picture, names by language)."""

    key: str
    language: str
    title: str
    body: str
    figures: tuple[tuple[Image.Image, dict[str, str]], ...]


def make_pages(corpus: Path, out: Path, counts: tuple[int, int] = (1200, 240), seed: int = 0) -> None:
    """Writes `out/SPLIT/image-short/pages-figures` and `…/pages-titles` for train and test, whole or not at all, with
    the corpus's other data sets and its tokenizer beside them as links.

    Args:
        counts: pages in train and test; fewer if the corpus has fewer help pages.
    """
    emoji = [(picture(m), names(m)) for m in samples(corpus / "train/image-short/emoji")]
    font = corpus / "fonts" / "DejaVuSans.ttf"
    for split, count in zip(SPLITS, counts, strict=True):
        folders = ("train",) if split == "train" else ("validation", "test")
        helps = [m for folder in folders for m in samples(corpus / folder / "text-pairs/help")]
        pages = list(drawn_pages(helps, emoji, count, random.Random(f"{seed}-{split}"), once=split == "test"))
        rendered = [render(page, font, random.Random(page.key)) for page in pages]
        for name in SETS:
            write(out / split / "image-short" / f"pages-{name}", name, pages, rendered)
    for path in [*sorted(corpus.glob("*/*/*")), *corpus.glob("tokenizer.model")]:
        link = out / path.relative_to(corpus)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())


def samples(directory: Path) -> Iterator[dict[str, bytes]]:
    data = Dataset.open(directory)
    return (data.read(number) for number in range(len(data)))


def picture(members: dict[str, bytes]) -> Image.Image:
    return Image.open(io.BytesIO(members["png"])).convert("RGB").resize((FIGURE, FIGURE), Image.Resampling.BICUBIC)


def names(members: dict[str, bytes]) -> dict[str, str]:
    captions = json.loads(members["json"])["captions"]
    return {text["language"]: text["text"] for text in captions if text.get("role", "name") == "name"}


def drawn_pages(
    helps: list[dict[str, bytes]],
    emoji: list[tuple[Image.Image, dict[str, str]]],
    count: int,
    rng: random.Random,
    once: bool,
) -> Iterator[Page]:
    """Up to `count` pages with distinct titles; with `once` a figure stands on one page alone."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for content in (json.loads(members["json"]) for members in helps):
        bodies = {text["language"]: text["text"] for text in content["target"]}
        for query in content["query"]:
            if (language := query["language"]) in WRITTEN and language in bodies:
                found.setdefault((language, query["text"].partition(". ")[0]), (query["text"], bodies[language]))
    chosen = rng.sample(sorted(found), min(count, len(found)))
    deck = rng.sample(range(len(emoji)), len(emoji))
    for number, (language, title) in enumerate(chosen):
        at = [number * FIGURES + i for i in range(FIGURES)]
        if once and at[-1] >= len(deck):
            return
        figures = [emoji[deck[i]] for i in at] if once else rng.sample(emoji, FIGURES)
        yield Page(f"page-{number:04d}", language, title, found[language, title][1], tuple(figures))


def render(page: Page, font: Path, rng: random.Random) -> bytes:
    """The page as PNG: a heading of up to two lines, text down to the end, a figure in each quarter."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(image)
    heading, small = (ImageFont.truetype(str(font), points) for points in (13, 7))
    y = 4
    for line in textwrap.wrap(page.title, 23)[:2]:
        draw.text((5, y), line, "black", heading)
        y += 16
    top = y + 3
    for line in textwrap.wrap(page.body, 46)[: (SIZE - top) // 9]:
        draw.text((5, top), line, "#404040", small)
        top += 9
    first, half = y + 3, (SIZE - y - 3) // 2
    for number, (figure, _) in enumerate(page.figures):
        left = number % 2 * (SIZE // 2) + rng.randint(2, SIZE // 2 - FIGURE - 2)
        upper = first + number // 2 * half + rng.randint(0, max(0, half - FIGURE - 2))
        image.paste(figure, (left, upper))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write(directory: Path, name: str, pages: list[Page], rendered: list[bytes]) -> None:
    if directory.exists():
        return
    with DatasetWriter(directory, kind="image-short", source=f"pages-{name}") as writer:
        for page, png in zip(pages, rendered, strict=True):
            captions: list[dict[str, Any]] = [{"text": page.title, "language": page.language}]
            if name == "figures":
                of_page = [(language, of.get(language)) for _, of in page.figures for language in ASKED]
                captions = [{"text": text, "language": language} for language, text in of_page if text]
            content = {"captions": [{**text, "origin": "human", "role": "query"} for text in captions]}
            languages = sorted({text["language"] for text in captions})
            members = {"png": png, "json": json.dumps(content, ensure_ascii=False).encode()}
            writer.write(page.key, members, languages=languages, tokens=None)
