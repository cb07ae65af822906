"""From a glyph, a bitmap or a drawing to the small square picture that is stored."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

GLYPH_SIZE = 109  # the one size of the bitmaps in Noto Color Emoji
_CANVAS = (180, 160)  # room for its 136 × 128 pixels


@dataclass(frozen=True, slots=True)
class Job:
    """What to make a picture of: an emoji sequence in the font, or the bytes of a bitmap or SVG file."""

    kind: Literal["glyph", "bitmap", "svg"]
    data: Any


def make_pictures(jobs: Sequence[Job], *, size: int, font: bytes | None, workers: int) -> list[bytes | None]:
    """PNG files in the order of `jobs`, RGB over white, `size` pixels square; None where there is nothing to see.

    The picture is cut to what is visible and put in the middle of a white square, so that a resize to any training
    resolution neither crops nor stretches it. The result does not depend on `workers`.
    """
    make = partial(_picture, size=size)
    if workers <= 1 or len(jobs) < 64:
        _load_font(font)
        return [make(job) for job in jobs]
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_load_font, initargs=(font,)) as pool:
        return list(pool.map(make, jobs, chunksize=32))


def encode_png(image: Image.Image) -> bytes:
    """The PNG file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=9)
    return buffer.getvalue()


def pixels(png: bytes, size: int) -> np.ndarray:
    """The picture at `size` × `size`, `[size, size, 3]` float32 in 0 to 255."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)


_font: ImageFont.FreeTypeFont | None = None


def _load_font(font: bytes | None) -> None:
    global _font
    _font = None
    if font is not None:
        # Raqm joins the sequences (a family, a flag); without it each part would be drawn by itself.
        _font = ImageFont.truetype(io.BytesIO(font), GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)


def _picture(job: Job, size: int) -> bytes | None:
    try:
        image = _open(job, size)
    except (UnidentifiedImageError, ValueError, OSError, SyntaxError):
        return None
    if image is None:
        return None
    visible = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if visible is None:
        return None
    image = image.crop(visible)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    flat = white.convert("RGB")
    scale = size / max(flat.size)
    target = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    flat = flat.resize(target, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(flat, ((size - flat.width) // 2, (size - flat.height) // 2))
    if all(low > 245 for low, _ in square.getextrema()):  # white on white
        return None
    return encode_png(square)


def _open(job: Job, size: int) -> Image.Image | None:
    if job.kind == "glyph":
        assert _font is not None, "glyphs need the font"
        image = Image.new("RGBA", _CANVAS, (255, 255, 255, 0))
        ImageDraw.Draw(image).text((10, 10), job.data, font=_font, embedded_color=True)
        return image
    if job.kind == "svg":
        import resvg_py

        return Image.open(
            io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=job.data.decode("utf-8"), width=4 * size)))
        ).convert("RGBA")
    return Image.open(io.BytesIO(job.data)).convert("RGBA")
