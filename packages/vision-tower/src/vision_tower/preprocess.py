"""From a file, bytes, an array or a PIL image to the pixels that the tower expects."""

from __future__ import annotations

import functools
import importlib
import io
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vision_tower.config import MEAN, STD, Resolution, as_pair, check_crop
from vision_tower.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

# What files and bytes may be. Pillow would let them choose among fifty decoders, and that of EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# Where Pillow itself refuses to open an image.
MAX_PIXELS = 178_956_970

# If resizing would give more pixels than this, only the centre is computed: a 1 x 20,000 strip would grow to a billion
# pixels, of which 224 x 224 are kept.
MAX_RESIZED = 2**24

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Any, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """An upright RGB image from a path, encoded bytes, a PIL image, an array or a tensor.

    EXIF orientation is applied, transparency composed over white, 16-bit grey scaled to 8 bits, palette and CMYK
    converted; of an animation the first frame is taken (of a PIL image its current one). Grey of 32 bits (mode "I")
    does not say how many of them it uses: values up to 255 count as 8 bits, larger ones as 16.

    Args:
        source: files and bytes are of one of `FORMATS`; arrays are uint8 or uint16 `[H, W]`, or uint8
            `[H, W, 1 | 3 | 4]`; tensors uint8 `[3, H, W]`.
        max_pixels: larger images are refused from their header, before anything is decoded.
        name: the image's name in messages, if it is not a path.

    Raises:
        ImageError: an image that cannot be used; the message names it.
        FileNotFoundError: no such file.
    """
    with _opened(source, name, max_pixels) as image:
        return _upright_rgb(image)


def load_pixels(source: Any, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Tensor:
    """`load_image` as uint8 `[3, H, W]`, channels last in memory; arguments, pixels and errors are the same.

    Encoded JPEGs are decoded by simplejpeg where it is installed (`vision-tower[jpeg]`): the library that Pillow has,
    libjpeg-turbo, with the same settings, but straight into these bytes, where Pillow's pixels are copied three times.
    """
    import torch

    with _opened(source, name, max_pixels) as image:
        pixels = _of_jpeg(source, image)
        if pixels is None:
            pixels = np.array(_upright_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _of_jpeg(source: Any, image: Image.Image) -> np.ndarray | None:
    """The pixels `[H, W, 3]` of an intact upright JPEG in colour, by simplejpeg; None if it is another image, which is
    left to Pillow. So is the verdict on one of which libjpeg-turbo has but a warning to give."""
    if image.format != "JPEG" or image.mode != "RGB" or not isinstance(source, bytes) or not (jpeg := _simplejpeg()):
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) in _UPRIGHT:
        return None
    try:
        pixels: np.ndarray = jpeg.decode_jpeg(source)
    except ValueError:
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


@functools.cache
def _simplejpeg() -> Any:
    try:
        return importlib.import_module("simplejpeg")
    except ModuleNotFoundError:
        return None


def check_image(source: Any, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> None:
    """Refuses by its header what `load_image` would refuse, arguments and errors being the same; decodes nothing."""
    with _opened(source, name, max_pixels):
        pass


@contextmanager
def _opened(source: Any, name: str | None, max_pixels: int) -> Iterator[Image.Image]:
    """The image, not decoded yet; what goes wrong with it inside is raised as an ImageError."""
    label = name or _label(source)
    try:
        with _open(source, label) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"{label} is {image.width}x{image.height} pixels, more than the {max_pixels:,} allowed; "
                    "shrink it or raise max_pixels"
                )
            yield image
    except (ImageError, FileNotFoundError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ImageError(
            f"{label} cannot be decoded as an image: it is broken, or none of {known}; replace or skip it"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{label} is larger than Pillow opens ({error}); shrink it or skip it") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError and more on broken files
        raise ImageError(f"{label} cannot be decoded as an image ({error}); replace or skip it") from error


def _label(source: Any) -> str:
    if isinstance(source, str | PathLike):
        return str(fspath(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source):,} bytes"
    return str(getattr(source, "filename", "") or f"image given as {type(source).__name__}")


def _is_tensor(source: Any) -> bool:
    """Whether `source` is a tensor, without importing torch, which takes seconds: if it is not loaded, nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _open(source: Any, label: str) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller's stays open
    if isinstance(source, str | PathLike):
        return Image.open(source, formats=FORMATS)
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if _is_tensor(source):
        import torch

        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3 or 0 in source.shape:
            raise ImageError(f"{label} is {source.dtype} {list(source.shape)}; expected a uint8 tensor [3, H, W]")
        return picture_of(source)
    if isinstance(source, np.ndarray):
        array = source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source
        colour = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (3, 4)
        if array.size == 0 or not (colour or (array.ndim == 2 and array.dtype in (np.uint8, np.uint16))):
            raise ImageError(
                f"{label} is {source.dtype} {list(source.shape)}; "
                "expected uint8 [H, W, 3] (or 1 or 4 channels), or grey [H, W]"
            )
        return Image.fromarray(np.ascontiguousarray(array))
    raise ImageError(f"{label} is not an image; expected a path, bytes, a PIL image, an array or a tensor")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # ImageOps.exif_transpose also rewrites the other tags, and fails if one of them is damaged.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # Pillow's own conversion would clip what has more than 8 bits to white
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"grey values from {values.min():g} to {values.max():g}, and 16 bits hold 0 to 65535")
        # I;16 has 16 bits, and so has a PGM, which Pillow scales up to them. Mode I does not say.
        of_8_bits = image.mode == "I" and image.format != "PPM" and values.max() <= 255
        grey = (values if of_8_bits else values / 257).round().astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    upright = image.convert("RGB")
    upright.info = {}  # the orientation must not be applied again
    return upright


def preprocess(
    image: Any,
    resolution: Resolution,
    *,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    fill: tuple[float, float, float] = MEAN,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """uint8 `[3, H, W]` for inference, from anything that `load_image` takes.

    Pillow resizes, tensors too, so the pixels are those of torchvision's and timm's transforms to the last level. (The
    strips beyond `MAX_RESIZED` may be resized in the other direction first: up to 30 levels at hard edges.)

    Args:
        image: see `load_image`.
        resolution: pixels, one number or (height, width).
        crop_pct: the image is resized to resolution / crop_pct; then the centre is cut out.
        crop_mode: "center" resizes the shortest edge to that size (for (H, W), by the smallest factor that covers
            both), "squash" both edges, "border" the longest, with a border around the rest.
        interpolation: one of Pillow's, antialiased.
        fill: colour of a border, RGB in 0 … 1; timm's is the mean.
        max_pixels: of the image as it is given, see `load_image`.

    Raises:
        ImageError, FileNotFoundError: as `load_image`.
        ValueError: settings out of range.
    """
    check_crop(crop_pct, crop_mode, interpolation)
    height, width = as_pair(resolution)
    picture = load_image(image, max_pixels=max_pixels)
    size = _resized(picture.size, (height, width), float(crop_pct), crop_mode)  # numpy's numbers may have fewer bits
    resample = Image.Resampling[interpolation.upper()]
    # A border is added, its odd pixel to the right and below, before the centre is cut out.
    border = [max(0, side - found) for side, found in zip((width, height), size, strict=True)]
    left, top = (
        -(missing // 2) if missing else round((found - side) / 2)
        for missing, found, side in zip(border, size, (width, height), strict=True)
    )
    right, bottom = left + width, top + height
    if size[0] * size[1] > MAX_RESIZED and not any(border):
        x, y = picture.width / size[0], picture.height / size[1]
        box = (left * x, top * y, min(picture.width, right * x), min(picture.height, bottom * y))
        return pixels_of(picture.resize((width, height), resample, box))
    resized = picture if picture.size == size else picture.resize(size, resample)
    if not any(border):
        return pixels_of(resized.crop((left, top, right, bottom)))
    canvas = Image.new("RGB", (width, height), tuple(round(255 * value) for value in fill))
    canvas.paste(resized, (-left, -top))
    return pixels_of(canvas)


def _resized(size: tuple[int, int], target: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """The size (width, height) to which an image of `size` is resized; `target` is (height, width)."""
    columns, rows = size
    height, width = (math.floor(side / crop_pct) for side in target)
    if crop_mode == "squash":
        return width, height
    if crop_mode == "center" and height == width:  # torchvision's Resize, which rounds down
        short = min(columns, rows)
        return width * columns // short, width * rows // short
    # timm's ResizeKeepRatio
    ratios = rows / height, columns / width
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    # At least one pixel: a long strip within a border would vanish, and timm fails.
    return max(1, round(columns / ratio)), max(1, round(rows / ratio))


def preprocess_native(
    image: Any, *, patch: int, max_patches: int, interpolation: str = "bicubic", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """uint8 `[3, rows * patch, columns * patch]` for packing: the whole image in its own shape.

    The image is scaled to the area of `max_patches` and then stretched to whole patches (Pix2Struct, arXiv 2210.03347),
    at least one row and one column: by less than one patch, unless the image is narrower than 1 : max_patches.

    Raises:
        ImageError, FileNotFoundError: as `load_image`.
        ValueError: a number below 1, or an unknown interpolation.
    """
    if patch < 1 or max_patches < 1:
        raise ValueError(f"patch is {patch} and max_patches {max_patches}; expected at least 1")
    check_crop(1.0, "center", interpolation)
    picture = load_image(image, max_pixels=max_pixels)
    width, height = picture.size
    # Square roots in integers, rounded down: floating point could lose a row if the root is whole.
    rows = min(max_patches, max(1, math.isqrt(max_patches * height // width)))
    columns = min(max_patches // rows, max(1, math.isqrt(max_patches * width // height)))
    return pixels_of(picture.resize((columns * patch, rows * patch), Image.Resampling[interpolation.upper()]))


def picture_of(pixels: Tensor) -> Image.Image:
    """uint8 `[3, H, W]` on any device as an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB image as uint8 `[3, H, W]`."""
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor, mean: tuple[float, float, float] = MEAN, std: tuple[float, float, float] = STD) -> Tensor:
    """`(x / 255 - mean) / std` in float32, from uint8 `[N, 3, H, W]` or `[3, H, W]`, on its device.

    Mean and std are CLIP's by default; `VisionTower.normalize` uses those of its weights.

    Raises:
        ValueError: another dtype or shape.
    """
    import torch

    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, 3, H, W] or [3, H, W]")
    # The dtype is explicit because torch.set_default_dtype may have changed the default; made elsewhere than on a CPU,
    # a tensor of numbers would make the host wait.
    of_channels = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in (mean, std))
    mean_, std_ = (values[:, None, None].to(images.device, non_blocking=True) for values in of_channels)
    return images.float().mul_(1 / (255 * std_)).sub_(mean_ / std_)
