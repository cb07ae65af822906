"""search.png: some queries in several languages and the images that a model finds for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stage_trainer.data.keyed import key
from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import Embedded, Pool, embed, pools_of
from stage_trainer.model import DualEncoder

SHOWN_LANGUAGES = ("en", "de", "fr", "es", "pl", "ru", "el", "ar", "vi", "ka", "ja", "zh", "ko", "hi", "th")
TILE, GAP, LEFT, COLUMNS = 96, 10, 340, 6
RIGHT, INK, PALE = (24, 128, 56), (30, 30, 34), (120, 120, 128)

Found = tuple[str, str, list[tuple[bytes, bool]]]
"""A query, a note on it, and the images found: (file, whether it is the right one)."""


def draw_search(model_directory: str | Path, data: str | Path, queries: Sequence[str], out: str | Path) -> None:
    """Draws one row for each query: the text at the left, the nearest images of all pools at the right.

    Without `queries`, twelve names of held-out items are taken, in as many languages; the item meant is framed.
    """
    model = DualEncoder.from_pretrained(model_directory)
    pools = [Pool.open(directory) for directory in pools_of(data)]
    fonts = fonts_of(Path(data))
    rows = _given(model, pools, queries) if queries else own_rows(pools, [embed(model, pool) for pool in pools], fonts)
    canvas = draw(rows, fonts, note="" if queries else " (green: the item meant)")
    try:
        canvas.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"could not write the picture {out}: {error}; name another file that ends in .png") from error


def draw(rows: Sequence[Found], fonts: list[Path], note: str = " (green: the item meant)") -> Image.Image:
    """One row for each query: the text at the left, the images found at the right."""
    canvas = Image.new("RGB", (LEFT + COLUMNS * (TILE + GAP) + GAP, 64 + len(rows) * (TILE + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, 20), "query", INK, _pick(fonts, "query", 20))
    pen.text((LEFT, 20), f"nearest images{note}", INK, _pick(fonts, "nearest", 20))
    for row, (query, remark, found) in enumerate(rows):
        top = 64 + row * (TILE + GAP)
        font = _pick(fonts, query, 20)
        for line, part in enumerate(_wrap(query, font, LEFT - 2 * GAP)[:3]):
            pen.text((GAP, top + 6 + 26 * line), part, INK, font)
        pen.text((GAP, top + TILE - 18), remark, PALE, _pick(fonts, remark, 13))
        for column, (file, right) in enumerate(found):
            left = LEFT + column * (TILE + GAP)
            tile = Image.open(io.BytesIO(file)).convert("RGB")
            tile.thumbnail((TILE, TILE))
            canvas.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            if right:
                pen.rectangle((left - 4, top - 4, left + TILE + 3, top + TILE + 3), outline=RIGHT, width=4)
    return canvas


def _given(model: DualEncoder, pools: list[Pool], queries: Sequence[str]) -> list[Found]:
    images = [image for pool in pools for image in pool.images]
    vectors = model.encode_image(images)
    nearest = np.argsort(-(model.encode_text(list(queries)) @ vectors.T), axis=1)[:, :COLUMNS]
    return [(query, "", [(images[i], False) for i in row]) for query, row in zip(queries, nearest, strict=True)]


def own_rows(pools: list[Pool], embedded: list[Embedded], fonts: list[Path]) -> list[Found]:
    """Names of held-out items, pool by turns; picked by a hash, not by how well they do."""
    rows: list[Found] = []
    shown: set[tuple[int, int]] = set()
    for turn, language in enumerate(SHOWN_LANGUAGES):
        which = turn % len(pools)
        pool, vectors = pools[which], embedded[which]
        entries = [e for e in pool.texts.get(language, []) if (which, e[0]) not in shown]
        entries.sort(key=lambda entry: key("shown", entry))
        chosen = next((entry for entry in entries if _drawable(fonts, entry[1])), None)
        if chosen is None or len(rows) == 12:
            continue
        number, text = chosen
        shown.add((which, number))
        query = vectors.texts[vectors.row[text]]
        images = vectors.images / np.linalg.norm(vectors.images, axis=1, keepdims=True)
        order = np.argsort(-(images @ query))
        rank = int(np.where(order == number)[0][0]) + 1
        meaning = text if language == "en" else dict(pool.texts.get("en", [])).get(number, text)
        note = f"{language}: {meaning} (place {rank} of {len(order)})"
        rows.append((text, note, [(pool.images[i], bool(i == number)) for i in order[:COLUMNS]]))
    return rows


def fonts_of(data: Path) -> list[Path]:
    """The corpus's own fonts, then the system's; Pillow's built-in one covers Latin where there are none."""
    system = [*Path("/usr/share/fonts").rglob("*.tt[fc]"), *Path("/System/Library/Fonts").rglob("*.tt[fc]")]
    found = sorted((data / "fonts").glob("*.ttf")) + sorted(system, key=lambda p: (p.name != "DejaVuSans.ttf", str(p)))
    return [path for path in found if "Emoji" not in path.name]


def _drawable(fonts: list[Path], text: str) -> bool:
    return any(_has_glyphs(_load(font, 20), text) for font in [*fonts[:20], None])


def _pick(fonts: list[Path], text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has every letter of `text`."""
    candidates = [_load(font, size) for font in [*fonts[:20], None]]
    return next((f for f in candidates if _has_glyphs(f, text)), candidates[-1])


def _load(path: Path | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _has_glyphs(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isspace())


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
