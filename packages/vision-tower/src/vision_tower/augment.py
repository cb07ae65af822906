"""Training augmentation on uint8 pixels, a pure function of each sample's seed."""

from __future__ import annotations

import math
import random
from operator import index
from typing import TYPE_CHECKING

from vision_tower.config import Resolution, as_pair

if TYPE_CHECKING:
    from torch import Tensor

# ITU-R 601, as Pillow's and torchvision's greys.
LUMA = (0.299, 0.587, 0.114)


def augment(
    image: Tensor,
    seed: int,
    resolution: Resolution,
    *,
    scale: tuple[float, float] = (0.7, 1.0),
    ratio: tuple[float, float] = (0.9, 1.1),
    flip: bool = False,
    color: float = 0.0,
) -> Tensor:
    """Random resized crop of `image`, uint8 `[3, h, w]` on the CPU, to uint8 `[3, R, R]` (or `[3, H, W]` for a pair).

    The area is a share of the largest crop of its shape that fits, so a banner's crop is as random as a square's, where
    torchvision's RandomResizedCrop falls back to the centre. For squares and narrow ratios the two are nearly the same.

    PyTorch's kernel for uint8 resizes (bicubic with antialiasing), as in torchvision.transforms.v2 on tensors. It takes
    an eighth of the time of Pillow's, which inference has. Its weights have 16 bits, so one value in 10,000 is two
    levels off; at hard edges it is more for crops whose height shrinks so much that Pillow (from 13) starts with it.

    Args:
        image: the pixels; channels last in memory (as `load_pixels` leaves them) is fastest.
        seed: any integer; the result depends on nothing else.
        resolution: pixels, one number or (height, width).
        scale: range of the area, as a share of the largest crop of its shape that fits in the image.
        ratio: range of the crop's width over height, relative to that of the resolution; log-uniform.
        flip: mirror half of the images; off by default, since captions speak of left and right, and images hold text.
        color: strength c of colour jitter: brightness, contrast and saturation each by a factor from 1 - c to 1 + c.

    Raises:
        ValueError: another kind of image, or a range out of bounds.
    """
    import torch
    import torch.nn.functional as F

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}; expected uint8 [3, h, w]")
    if not 0 <= color < 1:
        raise ValueError(f"color is {color}; expected 0 <= color < 1")
    draw = random.Random(index(seed) & 0xFFFFFFFFFFFFFFFF)  # Random takes -1 and 1 for the same seed
    height, width = as_pair(resolution)
    top, left, rows, columns = _crop(draw, image.shape[1:], width / height, scale, ratio)
    mirrored = flip and draw.random() < 0.5

    crop = image[None, :, top : top + rows, left : left + columns].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(crop, (height, width), mode="bicubic", antialias=True, align_corners=False)
    pixels = resized[0].contiguous()
    if mirrored:
        pixels = pixels.flip(-1)
    if not color:
        return pixels
    draw = random.Random(f"color {index(seed)}")  # a second stream: how many numbers the crop draws depends on its size
    return jitter(pixels, *(draw.uniform(1 - color, 1 + color) for _ in range(3)))


def _crop(
    draw: random.Random, size: tuple[int, ...], aspect: float, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a random crop that lies inside the image."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; expected 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio is {ratio}; expected 0 < low <= high")
    height, width = size
    side = math.sqrt(draw.uniform(*scale))
    shape = aspect * math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
    rows = min(height, max(1, round(side * min(height, width / shape))))
    columns = min(width, max(1, round(side * min(width, height * shape))))
    return draw.randint(0, height - rows), draw.randint(0, width - columns), rows, columns


def jitter(pixels: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Brightness, then contrast about the image's mean grey, then saturation about each pixel's grey: one affine map of
    the colours, so one small product and one rounding."""
    import torch

    values, luma = pixels.flatten(1).float(), torch.tensor(LUMA, dtype=torch.float32, device="cpu")
    mean_grey = (luma @ values.mean(dim=1)) * brightness
    identity = torch.eye(3, dtype=torch.float32, device="cpu")
    matrix = brightness * contrast * (saturation * identity + (1 - saturation) * luma.expand(3, 3))
    values = torch.addmm((1 - contrast) * mean_grey, matrix, values)
    return values.round_().clamp_(0, 255).to(torch.uint8).view_as(pixels)
