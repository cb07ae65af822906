"""Image files: opened for training, stored by an importer, decoded by a tower."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache, partial
from pathlib import Path

from fuzz.harness import Files, Kind, all_of
from fuzz.values import damaged
from hypothesis import strategies as st

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_OTHERS = ("ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "PDF", "EPS", "IM", "SPIDER", "MSP", "XBM")
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def _open(folder: Path) -> None:
    from data_prep.image_rule import ImageRule
    from data_prep.images import store_image
    from vision_tower import load_image

    content = (folder / "image.png").read_bytes()
    all_of(
        partial(load_image, content, name="image"),
        partial(load_image, folder / "image.png"),
        partial(store_image, content, ImageRule()),
    )


@cache
def picture(form: str, mode: str = "RGB", **options: object) -> bytes:
    """A file of 12 x 9 pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((12, 9)).convert(mode).save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8, colour: int = 2, content: bytes = b"\0" * 64, rows: int = 0) -> bytes:
    """A PNG of any stated size, whose pixels may be missing; `content` is repeated `rows` times."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    pixels = b"".join([*(packer.compress(content) for _ in range(rows or 1)), packer.flush()])
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def _all() -> list[bytes]:
    found = [picture(form) for form in FORMATS] + [picture(form, "L") for form in FORMATS]
    found += [picture("PNG", mode) for mode in ("1", "P", "LA", "RGBA", "I;16")]
    found += [picture("TIFF", mode) for mode in ("F", "I", "CMYK")] + [picture("JPEG", "CMYK"), picture("WEBP", "RGBA")]
    return [*found, picture("TIFF", compression="tiff_lzw"), picture("JPEG", progressive=True), _EPS]


@cache
def _strange() -> list[bytes]:
    """Files of formats that must not be opened, as far as Pillow can write them."""
    found = [_EPS, b"8BPS" + bytes(60), b"GIF89a" + b"\xff" * 30]
    for form in _OTHERS:
        for mode in ("RGB", "L", "1", "F"):
            try:
                found.append(picture(form, mode))
                break
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def _cases() -> st.SearchStrategy[Files]:
    sizes = st.sampled_from((0, 1, 9, 4096, 16_000, 2**16, 2**20, 2**31 - 1, 2**32 - 1)) | st.integers(0, 2000)
    headers = st.builds(
        png, sizes, sizes, st.sampled_from((1, 2, 4, 8, 16, 3)), st.sampled_from((0, 2, 3, 4, 6, 1)),
        st.binary(max_size=64)
    )  # fmt: skip
    whole = st.sampled_from(_all())
    content = st.one_of(
        whole.flatmap(damaged),
        whole.flatmap(damaged),
        headers,
        st.sampled_from(_strange()).flatmap(lambda found: st.one_of(st.just(found), damaged(found))),
        st.binary(max_size=64),
    )
    return content.map(lambda found: {"image.png": found})


def _valid() -> list[Files]:
    return [{"image.png": picture(form)} for form in ("PNG", "JPEG", "WEBP")]


# A picture of all the pixels that are allowed takes 3 bytes a pixel in RGB, and once more when it is converted.
KINDS = [Kind("images", _open, _valid, _cases, megabytes=1300)]
