"""From an image file that somebody made to one that is stored: checked, upright, of the size that training needs."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from dataclasses import dataclass

from PIL import Image

from data_prep.image_rule import ImageRule

_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are stored as they come, if nothing else is amiss
_READ = [*_KEPT, "GIF", "BMP", "TIFF", "PPM", "AVIF"]  # no formats that run programs (EPS) or hold vectors
_ORIENTATION = 0x0112  # of EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Loaded by name: Pillow would load its forty others too. AVIF is there if Pillow was built with it.
for _name in ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Avif"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"PIL.{_name}ImagePlugin")
_READ = [name for name in _READ if name in Image.OPEN]

# Pillow warns of large images and of odd files; here the former have a limit of their own, `ImageRule.max_pixels`, that
# is checked before anything is decoded, and the latter are read or refused.
warnings.filterwarnings("ignore", module="PIL")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it is stored: extension and bytes, and whether they are not the bytes that came."""

    extension: str
    data: bytes
    encoded_anew: bool


class ImageRefused(ValueError):
    """An image that is not stored; its message is a reason for the receipt, of which there are few."""


def store_image(data: bytes, rule: ImageRule) -> StoredImage:
    """What to store for an image file.

    A JPEG, PNG or WebP that has the right size, stands upright and has plain grey or RGB pixels stays as it is, byte
    for byte (after it was decoded, to know that it can be). Everything else is decoded, turned upright by its EXIF
    tag, put on white where it is transparent, reduced and encoded.

    Raises:
        ImageRefused: it is no image, it is broken, or it has more than `rule.max_pixels`.
    """
    if not data:
        raise ImageRefused("empty image file")
    try:
        image = Image.open(io.BytesIO(data), formats=_READ)
    except Image.DecompressionBombError as error:
        raise ImageRefused("more pixels than allowed") from error
    except Exception as error:  # Pillow's readers raise whatever their parsing runs into
        raise ImageRefused("not an image") from error
    if image.width * image.height > rule.max_pixels:
        raise ImageRefused("more pixels than allowed")
    try:
        if image.format == "TIFF":
            image.load()  # turns it upright, and its size was given upright before
        target = _target(_as_it_lies(image.size, image), rule)
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info
        if (
            image.format in _KEPT
            and plain
            and target == image.size
            and image.getexif().get(_ORIENTATION, 1) == 1
            and getattr(image, "n_frames", 1) == 1
        ):
            image.load()
            return StoredImage(_KEPT[image.format], data, False)
        if image.format == "JPEG":  # decode at a half, a quarter, …, never below the size that is wanted
            spare = 2 if rule.kernel == "bicubic" else 1
            width, height = _as_it_lies(target, image)
            image.draft(None, (spare * width, spare * height))
        return StoredImage(rule.encoding, encode_image(_reduce(image, target, rule), rule), True)
    except Exception as error:  # the readers again: pixels are decoded, and EXIF is parsed, only here
        raise ImageRefused("broken image") from error


def encode_image(image: Image.Image, rule: ImageRule) -> bytes:
    """The file of an image, in the rule's encoding."""
    buffer = io.BytesIO()
    if rule.encoding == "png":
        image.save(buffer, "PNG", compress_level=6)
    elif rule.encoding == "webp":
        image.save(buffer, "WEBP", quality=rule.quality)
    else:
        image.save(buffer, "JPEG", quality=rule.quality)
    return buffer.getvalue()


def fit_image(image: Image.Image, rule: ImageRule) -> Image.Image:
    """An image in memory (a rendered page) at the size that the rule asks for."""
    return _reduce(image, _target(image.size, rule), rule)


def _as_it_lies(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """From the upright image's width and height to those of the pixels in the file, or back."""
    return size[::-1] if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else size


def _target(size: tuple[int, int], rule: ImageRule) -> tuple[int, int]:
    if rule.fit == "square":
        return rule.size, rule.size
    scale = min(1.0, rule.size / (min(size) if rule.fit == "shortest" else max(size)))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _reduce(image: Image.Image, target: tuple[int, int], rule: ImageRule) -> Image.Image:
    """Plain pixels, upright, resampled with a kernel that is widened to the scale."""
    if image.mode not in ("RGB", "L"):
        image = _plain(image)
    elif "transparency" in image.info:
        image = _plain(image.convert("RGBA"))
    # ImageOps.exif_transpose writes the other tags anew, too, and fails where one of them is damaged.
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    if turn is not None:
        image = image.transpose(turn)
    kernel = Image.Resampling.BICUBIC if rule.kernel == "bicubic" else Image.Resampling.HAMMING
    return image if image.size == target else image.resize(target, kernel)


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits or more a pixel: `convert` would clip, not scale
        import numpy as np  # rare, and slow to load

        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageRefused("pixels that are no numbers")
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageRefused("pixels of no known range")
        # I;16 is of 16 bits, and so is what Pillow reads from a PGM, which it scales up to them; a dark image must not
        # be taken for one of fewer. The others do not say, so their largest value does.
        of_16_bits = image.mode.startswith("I;16") or image.format == "PPM"
        limits = [65535] if of_16_bits else [1, 255, 65535] if image.mode == "F" else [255, 65535]
        top = next(limit for limit in limits if values.max(initial=0) <= limit)
        grey = Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))
        grey.info = {key: value for key, value in image.info.items() if key == "exif"}
        return grey
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        white.info = {key: value for key, value in image.info.items() if key == "exif"}
        return white.convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")
