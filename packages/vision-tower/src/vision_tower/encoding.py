"""`encode`: images of any kind in, numpy embeddings out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ImageError
from .packed import PackedPatches
from .preprocess import normalize as normalize_pixels
from .preprocess import preprocess, preprocess_native

if TYPE_CHECKING:
    from .tower import VisionTower


def encode(
    tower: VisionTower,
    images: Sequence[Any] | Tensor | np.ndarray,
    *,
    truncate_dim: int | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    native_aspect: bool = False,
    show_progress: bool = False,
) -> np.ndarray:
    """float32 `[N, truncate_dim or width]`, in the order given: truncated first, then L2-normalised.

    images         a sequence of paths, encoded bytes, PIL images, arrays `[H, W, 3]` and uint8 tensors `[3, H, W]`,
                   mixed as you like; or one uint8 tensor `[N, 3, H, W]`; or one array `[N, H, W, 3]`
    truncate_dim   the first so many dimensions alone (Matryoshka), 1 … width
    native_aspect  keep every image's own shape (`preprocess_native`), with at most as many patches as the set
                   resolution has: for pages, which lose text when they are cropped to a square
    normalize      False leaves the length of each embedding as the tower made it
    show_progress  a progress bar on stderr

    Runs where the tower's weights are, without gradients. Raises ImageError, which names the image, FileNotFoundError
    and ValueError.
    """
    width = tower.config.width
    if truncate_dim is not None and not 1 <= truncate_dim <= width:
        raise ValueError(f"truncate_dim is {truncate_dim}; expected 1 … {width}, this tower's width")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    usable = not isinstance(images, str | bytes)
    if isinstance(images, Tensor | np.ndarray):
        usable = images.ndim == 4 or (images.ndim == 1 and images.dtype == object)  # 1: of paths, from a table
    try:
        images[:0]
    except (TypeError, KeyError):
        usable = False
    if not usable:
        raise ValueError(
            f"encode takes a sequence of images and got a {type(images).__name__}; write encode([image]), or "
            "encode(list(images))"
        )
    starts: Any = range(0, len(images), batch_size)
    if show_progress:
        from tqdm import tqdm

        starts = tqdm(starts, desc="images", unit="batch")
    results = [np.empty((0, truncate_dim or width), dtype=np.float32)]
    with torch.inference_mode():
        for start in starts:
            batch = enumerate(images[start : start + batch_size], start)
            pixels = [_pixels(tower, image, number, native_aspect) for number, image in batch]
            inputs = _packed(tower, pixels) if native_aspect else _stacked(tower, pixels)
            embeddings = tower(inputs)[:, :truncate_dim].float()
            results.append((F.normalize(embeddings, dim=-1) if normalize else embeddings).cpu().numpy())
    return np.concatenate(results)


def _pixels(tower: VisionTower, image: Any, number: int, native_aspect: bool) -> Tensor:
    config = tower.config
    try:
        if native_aspect:
            return preprocess_native(image, patch=config.patch, max_patches=config.num_patches)
        return preprocess(image, config.resolution)
    except ImageError as error:
        raise ImageError(f"images[{number}]: {error}") from error


def _stacked(tower: VisionTower, pixels: list[Tensor]) -> Tensor:
    return normalize_pixels(torch.stack(pixels).to(tower.pos_embed.device))


def _packed(tower: VisionTower, pixels: list[Tensor]) -> PackedPatches:
    device = tower.pos_embed.device
    return PackedPatches.from_images([normalize_pixels(image.to(device)) for image in pixels], tower.config.patch)
