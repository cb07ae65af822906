"""Turns any image file into one to store: checked, upright, at the size that training needs."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from data_prep.image_rule import ImageRule

_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that may be stored unchanged
STORED = tuple(_KEPT)  # what an image of a shard may be; bytes never choose their decoder
_READ = [*_KEPT, "GIF", "BMP", "TIFF", "PPM", "AVIF"]  # not those that run programs (EPS) or hold vectors
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

# Loaded by name, or Pillow would load its forty other plugins too. AVIF depends on how Pillow was built.
for _name in ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Avif"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"PIL.{_name}ImagePlugin")
_READ = [name for name in _READ if name in Image.OPEN]

# Pillow warns of large images and of odd files. Here `ImageRule.max_pixels` limits the former before anything is
# decoded, and the latter are read or refused.
warnings.filterwarnings("ignore", module="PIL")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it is stored: extension and bytes, and whether it was encoded again."""

    extension: str
    data: bytes
    encoded_anew: bool


class ImageRefused(ValueError):
    """An image that is not stored; the message is one of the few reasons that receipts count."""


def store_image(data: bytes, rule: ImageRule) -> StoredImage:
    """Return what to store for an image file.

    A JPEG, PNG or WebP of the right size that is upright and has plain grey or RGB pixels is kept byte for byte (after
    a trial decode). Everything else is decoded, turned upright by its EXIF tag, put on white where it is transparent,
    resized and encoded.

    Raises:
        ImageRefused: not an image, broken, or more than `rule.max_pixels`.
    """
    if not data:
        raise ImageRefused("empty image file")
    try:
        image = Image.open(io.BytesIO(data), formats=_READ)
    except Image.DecompressionBombError as error:
        raise ImageRefused("more pixels than allowed") from error
    except Exception as error:  # Pillow's readers raise all kinds of exceptions
        raise ImageRefused("not an image") from error
    if image.width * image.height > rule.max_pixels:
        raise ImageRefused("more pixels than allowed")
    try:
        if image.format == "TIFF":
            image.load()  # Pillow turns TIFFs upright here; `size` was that of the upright image before
        target = _target(_stored_size(image.size, image), rule)
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
        if image.format == "JPEG":  # decode at 1/2, 1/4, … but not below the target size
            spare = 2 if rule.kernel == "bicubic" else 1
            width, height = _stored_size(target, image)
            image.draft(None, (spare * width, spare * height))
        return StoredImage(rule.encoding, encode_image(_reduce(image, target, rule), rule), True)
    except Exception as error:  # the readers again: pixels and EXIF are parsed only here
        raise ImageRefused("broken image") from error


def check_stored(data: bytes, *, max_pixels: int, decode: bool = True) -> None:
    """Refuse what a shard may not hold as an image; without `decode` by the header alone.

    Raises:
        ImageRefused: not a JPEG, PNG or WebP, broken, or more than `max_pixels`; the decoder's own words are its cause.
    """
    if not data:
        raise ImageRefused("empty image file")
    try:
        with Image.open(io.BytesIO(data), formats=STORED) as image:
            if image.width * image.height > max_pixels:
                raise ImageRefused("more pixels than allowed")
            if decode:
                image.load()
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefused("more pixels than allowed") from error
    except UnidentifiedImageError as error:
        raise ImageRefused("not a JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow's readers raise all kinds of exceptions
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


def _stored_size(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """Converts between the size of the upright image and that of the pixels in the file."""
    return size[::-1] if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else size


def _target(size: tuple[int, int], rule: ImageRule) -> tuple[int, int]:
    if rule.fit == "square":
        return rule.size, rule.size
    scale = min(1.0, rule.size / (min(size) if rule.fit == "shortest" else max(size)))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _reduce(image: Image.Image, target: tuple[int, int], rule: ImageRule) -> Image.Image:
    """Plain pixels, upright, resized with antialiasing."""
    if image.mode not in ("RGB", "L"):
        image = _plain(image)
    elif "transparency" in image.info:
        image = _plain(image.convert("RGBA"))
    # Not ImageOps.exif_transpose: it rewrites all EXIF tags and fails if one of them is damaged.
    transpose = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    if transpose is not None:
        image = image.transpose(transpose)
    kernel = Image.Resampling.BICUBIC if rule.kernel == "bicubic" else Image.Resampling.HAMMING
    return image if image.size == target else image.resize(target, kernel)


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel: `convert` would clip instead of scale
        import numpy as np  # rarely needed, and slow to import

        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageRefused("pixels that are no numbers")
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageRefused("pixels of no known range")
        # I;16 has 16 bits, and Pillow scales a PGM to 16 bits; a dark image must not be mistaken for one of fewer bits.
        # The other modes do not tell their range, so the largest value decides.
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
