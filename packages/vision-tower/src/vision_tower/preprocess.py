"""From a file, bytes, an array or a PIL image to the pixels that the tower expects."""

from __future__ import annotations

import io
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from .config import Resolution, as_pair
from .errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

# CLIP's (Radford et al., arXiv 2103.00020), for RGB in 0 … 1; EVA-CLIP and jina-clip-v2 keep them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Where Pillow itself refuses to open an image.
MAX_PIXELS = 178_956_970

# Of what would be larger than this when it is resized, the centre alone is computed: a 1 x 20,000 strip would grow to a
# billion pixels, of which 224 x 224 are kept.
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

    Arrays are uint8 or uint16 `[H, W]`, or uint8 `[H, W, 1 | 3 | 4]`; tensors uint8 `[3, H, W]`. EXIF orientation is
    applied, transparency laid over white, 16-bit grey scaled to 8 bits, palette and CMYK converted, and of an animation
    the first frame taken (of a PIL image the one that it stands at).

    max_pixels  larger images are refused from their header, before anything is decoded
    name        what errors call the image, where it is not a path

    Raises ImageError, which names the image, for whatever cannot be used; FileNotFoundError for a missing file.
    """
    label = name or _label(source)
    try:
        with _open(source, label) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"{label} is {image.width}x{image.height} pixels, more than the {max_pixels:,} allowed; "
                    "shrink it or raise max_pixels"
                )
            return _upright_rgb(image)
    except (ImageError, FileNotFoundError, MemoryError):
        raise
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
    """Whether it is a tensor; without torch, which takes seconds to import, nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _open(source: Any, label: str) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller's stays open
    if isinstance(source, str | PathLike):
        return Image.open(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(source))
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
    # ImageOps.exif_transpose writes the other tags anew, too, and fails where one of them is damaged.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("grey values beyond 16 bits")
        grey = (values / 257).round().astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    upright = image.convert("RGB")
    upright.info = {}  # or whoever reads the orientation again would turn it again
    return upright


def preprocess(image: Any, resolution: Resolution) -> Tensor:
    """uint8 `[3, H, W]` for inference: anything that `load_image` takes, its shortest edge brought to the resolution
    (bicubic, antialiased), then the centre. An (H, W) resolution is covered by the smallest resize that fills it.

    Pillow resizes, tensors too, so the pixels are those of torchvision's and timm's transforms to the last level. (The
    strips that `MAX_RESIZED` speaks of may be resized in the other direction first: up to 30 levels at hard edges.)
    """
    height, width = as_pair(resolution)
    picture = load_image(image)
    columns, rows = picture.size
    if height == width:  # torchvision's Resize, which rounds down
        short = min(columns, rows)
        size = (width * columns // short, height * rows // short)
    else:  # timm's ResizeKeepRatio
        ratio = min(rows / height, columns / width)
        size = (round(columns / ratio), round(rows / ratio))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    right, bottom = left + width, top + height
    if size[0] * size[1] <= MAX_RESIZED:
        return pixels_of(picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, right, bottom)))
    x, y = columns / size[0], rows / size[1]
    box = (left * x, top * y, min(columns, right * x), min(rows, bottom * y))
    return pixels_of(picture.resize((width, height), Image.Resampling.BICUBIC, box))


def preprocess_native(image: Any, *, patch: int, max_patches: int) -> Tensor:
    """uint8 `[3, rows * patch, columns * patch]` for packing: the whole image in its own shape, nothing cut off.

    The image is scaled to the area of max_patches, and rows and columns are the whole patches of that (Pix2Struct,
    arXiv 2210.03347), at least one each; it is stretched by less than one patch to fill them, a strip of more than
    max_patches to one by more.
    """
    if patch < 1 or max_patches < 1:
        raise ValueError(f"patch is {patch} and max_patches {max_patches}; expected at least 1")
    picture = load_image(image)
    width, height = picture.size
    # The roots rounded down, in whole numbers: a float would lose a row where the root is one.
    rows = min(max_patches, max(1, math.isqrt(max_patches * height // width)))
    columns = min(max_patches // rows, max(1, math.isqrt(max_patches * width // height)))
    return pixels_of(picture.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC))


def picture_of(pixels: Tensor) -> Image.Image:
    """uint8 `[3, H, W]` on any device as an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB image as uint8 `[3, H, W]`."""
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """float32 of the same shape, `(x / 255 - MEAN) / STD`, from uint8 `[N, 3, H, W]` or `[3, H, W]`, on its device."""
    import torch

    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, 3, H, W] or [3, H, W]")
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)
