"""Renders a glyph, a bitmap or an SVG as the small square image that is stored."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

GLYPH_SIZE = 109  # the only bitmap size of Noto Color Emoji
_CANVAS = (180, 160)  # room for its 136 × 128 pixels

_WHITE = 245  # of 255; pixels that are lighter in all channels count as background

# Old SVGs give their size in points or millimetres without a viewBox, which resvg refuses. Without a size it takes the
# bounding box, to which the image is cropped anyway.
_PHYSICAL_SIZE = re.compile(r'(?<=\s)(?:width|height)="[\d.]+(?:pt|mm|cm|in)"')


@dataclass(frozen=True, slots=True)
class RenderJob:
    """What to render: an emoji sequence in the font, in UTF-8, or the bytes of a bitmap or SVG file."""

    kind: Literal["glyph", "bitmap", "svg"]
    data: bytes


def render_images(jobs: Sequence[RenderJob], *, size: int, font: bytes | None, workers: int) -> list[bytes | None]:
    """PNG files in the order of `jobs`, RGB over white, `size` pixels square; None where nothing is visible.

    The image is cropped to what is visible and centred on a white square, so that a resize to any training resolution
    neither crops nor stretches it. The result does not depend on `workers`.
    """
    # Threads suffice: Pillow and zlib release the GIL.
    with ThreadPoolExecutor(workers, initializer=_load_font, initargs=(font,)) as pool:
        return list(pool.map(partial(_picture, size=size), jobs))


def encode_png(image: Image.Image) -> bytes:
    """The PNG file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=6)
    return buffer.getvalue()


def pixels(png: bytes, size: int) -> np.ndarray:
    """The image at `size` × `size`, `[size, size, 3]` float32 in 0 to 255."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)


_thread = threading.local()  # a FreeType face is not thread-safe: each thread has its own


def _load_font(font: bytes | None) -> None:
    if font is not None:
        # Raqm draws sequences (a family, a flag) as one glyph; without it each part would be drawn separately.
        _thread.font = ImageFont.truetype(io.BytesIO(font), GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)


def _picture(job: RenderJob, size: int) -> bytes | None:
    try:
        image = _open(job, size)
    except (UnidentifiedImageError, ValueError, OSError, SyntaxError):
        return None
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    flat = white.convert("RGB")
    visible = Image.fromarray(np.asarray(flat).min(axis=2) < _WHITE).getbbox()
    if visible is None:
        return None
    flat = flat.crop(visible)
    scale = size / max(flat.size)
    target = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    flat = flat.resize(target, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(flat, ((size - flat.width) // 2, (size - flat.height) // 2))
    return encode_png(square)


def _open(job: RenderJob, size: int) -> Image.Image:
    if job.kind == "glyph":
        image = Image.new("RGBA", _CANVAS, (255, 255, 255, 0))
        ImageDraw.Draw(image).text((10, 10), job.data.decode(), font=_thread.font, fill="black", embedded_color=True)
        return image
    if job.kind == "svg":
        import resvg_py

        drawing = job.data.decode()
        if "viewBox" not in drawing:
            drawing = _PHYSICAL_SIZE.sub("", drawing, count=2)
        png = bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=4 * size))
    else:
        png = job.data
    return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
