"""The strong augmentation of SimCLR's image branch, on uint8 pixels, a pure function of each view's seed."""

from __future__ import annotations

import random
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_tower.augment import LUMA, augment, jitter
from vision_tower.config import Resolution


def simclr_view(
    image: Tensor,
    seed: int,
    resolution: Resolution,
    *,
    strength: float = 1.0,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    blur: bool = True,
) -> Tensor:
    """One of the two views of an image that SimCLR contrasts (arXiv 2002.05709, appendix A): draw two with two seeds.

    A random resized crop of 8 to 100 % of the area, mirrored with probability 0.5; with probability 0.8 brightness,
    contrast and saturation each by up to 80 % and hue by up to 0.2 of the circle; grey with probability 0.2; a Gaussian
    blur with probability 0.5, of sigma 0.1 to 2 over a tenth of the image's height.

    Args:
        image: uint8 `[3, h, w]` on the CPU.
        seed: any integer; the result depends on nothing else.
        resolution: pixels, one number or (height, width).
        strength: factor of all changes of colour: 1 for photographs, 0.5 for small images.
        scale, ratio, flip: as for `augment`; `flip=False` keeps text readable.
        blur: whether some views are blurred.

    Returns:
        uint8 `[3, H, W]`.

    Raises:
        ValueError: another kind of image, or a strength outside 0 … 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; expected 0 <= strength <= 1")
    pixels = augment(image, seed, resolution, scale=scale, ratio=ratio, flip=flip)
    draw = random.Random(f"simclr {index(seed)}")  # not the crop's stream
    if draw.random() < 0.8:
        change = 0.8 * strength
        pixels = jitter(pixels, *(draw.uniform(1 - change, 1 + change) for _ in range(3)))
        pixels = turn_hue(pixels, draw.uniform(-0.2, 0.2) * strength)
    if draw.random() < 0.2:
        luma = torch.tensor(LUMA, dtype=torch.float32, device="cpu")
        grey = torch.einsum("c,chw->hw", luma, pixels.float()).round_().to(torch.uint8)
        pixels = grey.expand_as(pixels).contiguous()
    if blur and draw.random() < 0.5:
        pixels = gaussian_blur(pixels, draw.uniform(0.1, 2.0))
    return pixels


def turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """uint8 `[3, H, W]` with its hue turned by a share of the circle; saturation and value (HSV) stay."""
    rgb = pixels.float()
    value, low = rgb.amax(0), rgb.amin(0)
    chroma = value - low
    r, g, b = rgb
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    # The three channels are one function of the hue, each shifted by a third of the circle.
    shifts = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float32, device="cpu")[:, None, None]
    k = (hue + 6 * turn + shifts) % 6
    turned = value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
    return turned.round_().clamp_(0, 255).to(torch.uint8)


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    """uint8 `[3, H, W]` blurred by a Gaussian over a tenth of the height, mirrored at the edges."""
    reach = max(1, min(round(pixels.shape[1] * 0.1) // 2, pixels.shape[1] - 1, pixels.shape[2] - 1))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32, device="cpu")
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixels.float()[None], (reach, reach, reach, reach), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, weights, groups=3), weights.mT, groups=3)
    return blurred[0].round_().clamp_(0, 255).to(torch.uint8)
