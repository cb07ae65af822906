"""From images of any kind to embeddings in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_tower.config import whole
from vision_tower.errors import ImageError
from vision_tower.packed import PackedPatches
from vision_tower.preprocess import MAX_PIXELS, preprocess_native

if TYPE_CHECKING:
    from vision_tower.tower import VisionTower


def encode(
    self: VisionTower,
    images: Iterable[Any] | Tensor | np.ndarray,
    *,
    truncate_dim: int | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    native_aspect: bool = False,
    max_pixels: int = MAX_PIXELS,
    show_progress: bool = False,
) -> np.ndarray:
    """Embeds images: float32 `[N, truncate_dim or width]`, in the order given.

    Images are brought to size and normalised as the weights want it (`VisionTowerConfig`). It runs where the tower's
    weights are, without gradients.

    Args:
        images: paths, encoded bytes, PIL images, arrays `[H, W, 3]` and uint8 tensors `[3, H, W]`, mixed freely, in a
            list, a column of a table or a generator (read batch by batch); or one uint8 tensor `[N, 3, H, W]`; or one
            array `[N, H, W, 3]`.
        truncate_dim: keep the first dims only (Matryoshka), 1 … width; done before normalising.
        batch_size: images in one forward pass.
        normalize: scale every row to length 1.
        native_aspect: keep every image's own shape (`preprocess_native`), with at most as many patches as the set
            resolution has: for pages, which lose text when they are cropped to a square.
        max_pixels: larger images are refused from their header; by default where Pillow itself refuses.
        show_progress: draw a progress bar.

    Raises:
        ImageError: an image that cannot be used; the message names it.
        FileNotFoundError: no such file.
        ValueError: a number out of range, or a dict, a set or a whole table, whose parts are names or in no order.
    """
    width = self.config.output_width
    dims = width if truncate_dim is None else whole(truncate_dim)
    if dims is None or not 1 <= dims <= width:
        raise ValueError(f"truncate_dim is {truncate_dim!r}; expected 1 … {width}, this tower's width")
    if (whole(max_pixels) or 0) < 1:
        raise ValueError(f"max_pixels is {max_pixels!r}; expected a whole number, at least 1")
    results = [np.empty((0, dims), dtype=np.float32)]
    done = 0
    with torch.inference_mode():
        for batch in _batches(images, batch_size, show_progress):
            pixels = [
                _pixels(self, image, number, native_aspect, max_pixels) for number, image in enumerate(batch, done)
            ]
            done += len(batch)
            rows = self(_input(self, pixels, native_aspect))[:, :dims].float()
            results.append((F.normalize(rows, dim=-1) if normalize else rows).cpu().numpy())
    return np.concatenate(results)


def _batches(images: Any, batch_size: int, show_progress: bool) -> Iterable[list[Any]]:
    step = whole(batch_size)
    if step is None or step < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number, at least 1")
    rest = iter(_in_order(images))
    batches = iter(lambda: list(islice(rest, step)), [])
    if not show_progress:
        return batches
    from tqdm import tqdm

    count = -(-len(images) // step) if isinstance(images, Sized) else None
    progress: Iterable[list[Any]] = tqdm(batches, desc="images", unit="batch", total=count)
    return progress


def _in_order(images: Any) -> Iterable[Any]:
    """The images, if they have an order: iterating over a dict, a set or a table gives names, or any order."""
    single = isinstance(images, str | bytes | bytearray | memoryview | PathLike) or not isinstance(images, Iterable)
    if isinstance(images, Tensor | np.ndarray):
        usable = images.ndim == 4 or (images.ndim == 1 and images.dtype == object)  # 1: of paths, from a table
        if isinstance(images, np.ndarray):
            usable |= images.ndim == 1 and images.dtype.kind in "US"
    elif isinstance(images, Sequence):
        usable = not single
    else:  # a generator, or a column
        is_table = getattr(images, "ndim", 1) != 1 or hasattr(images, "columns") or hasattr(images, "column_names")
        usable = not (single or is_table or isinstance(images, Mapping | Set))
    if not usable:
        raise ValueError(
            f"encode takes a sequence of images and got a {type(images).__name__}; write encode([image]) for one, "
            "encode(list(values)) for the values of a dict or a set, encode(table['image']) for a column of a table"
        )
    in_order: Iterable[Any] = images
    return in_order


def _pixels(tower: VisionTower, image: Any, number: int, native_aspect: bool, max_pixels: int) -> Tensor:
    config = tower.config
    try:
        if native_aspect:
            return preprocess_native(
                image,
                patch=config.patch,
                max_patches=config.num_patches,
                interpolation=config.interpolation,
                max_pixels=max_pixels,
            )
        return tower.preprocess(image, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"images[{number}]: {error}") from error


def _input(tower: VisionTower, pixels: list[Tensor], native_aspect: bool) -> Tensor | PackedPatches:
    device = tower.pos_embed.device
    if not native_aspect:
        return tower.normalize(torch.stack(pixels).to(device))
    return PackedPatches.from_images([tower.normalize(image.to(device)) for image in pixels], tower.config.patch)
