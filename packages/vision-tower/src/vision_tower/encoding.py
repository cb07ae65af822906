"""`encode`: images of any kind in, numpy embeddings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import whole
from .errors import ImageError
from .packed import PackedPatches
from .preprocess import preprocess_native

if TYPE_CHECKING:
    from .tower import VisionTower


def encode(
    tower: VisionTower,
    images: Iterable[Any] | Tensor | np.ndarray,
    *,
    truncate_dim: int | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    native_aspect: bool = False,
    show_progress: bool = False,
) -> np.ndarray:
    """float32 `[N, truncate_dim or width]`, in the order given: truncated first, then L2-normalised.

    images         paths, encoded bytes, PIL images, arrays `[H, W, 3]` and uint8 tensors `[3, H, W]`, mixed as you
                   like, in a list, a column of a table, a generator (read batch by batch); or one uint8 tensor
                   `[N, 3, H, W]`; or one array `[N, H, W, 3]`
    truncate_dim   the first so many dimensions alone (Matryoshka), 1 … width
    native_aspect  keep every image's own shape (`preprocess_native`), with at most as many patches as the set
                   resolution has: for pages, which lose text when they are cropped to a square
    normalize      False leaves the length of each embedding as the tower made it
    show_progress  a progress bar on stderr

    Images are brought to size and normalised as the weights want it (`VisionTowerConfig`). Runs where the tower's
    weights are, without gradients. Raises ImageError, which names the image, FileNotFoundError and ValueError: also for
    what holds images under names or in no order, as a dict, a set or a whole table.
    """
    width = tower.config.width
    dim = width if truncate_dim is None else whole(truncate_dim)
    if dim is None or not 1 <= dim <= width:
        raise ValueError(f"truncate_dim is {truncate_dim!r}; expected 1 … {width}, this tower's width")
    step = whole(batch_size)
    if step is None or step < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number, at least 1")
    rest = iter(_in_order(images))
    batches: Any = iter(lambda: list(islice(rest, step)), [])
    if show_progress:
        from tqdm import tqdm

        count = -(-len(images) // step) if isinstance(images, Sized) else None
        batches = tqdm(batches, desc="images", unit="batch", total=count)
    results = [np.empty((0, dim), dtype=np.float32)]
    done = 0
    with torch.inference_mode():
        for batch in batches:
            pixels = [_pixels(tower, image, number, native_aspect) for number, image in enumerate(batch, done)]
            done += len(batch)
            inputs = _packed(tower, pixels) if native_aspect else _stacked(tower, pixels)
            embeddings = tower(inputs)[:, :dim].float()
            results.append((F.normalize(embeddings, dim=-1) if normalize else embeddings).cpu().numpy())
    return np.concatenate(results)


def _in_order(images: Any) -> Iterable[Any]:
    """The images, if they are ones after another; of a dict, a set or a table one would get names, or any order."""
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
    return images


def _pixels(tower: VisionTower, image: Any, number: int, native_aspect: bool) -> Tensor:
    config = tower.config
    try:
        if native_aspect:
            kernel = config.interpolation
            return preprocess_native(image, patch=config.patch, max_patches=config.num_patches, interpolation=kernel)
        return tower.preprocess(image)
    except ImageError as error:
        raise ImageError(f"images[{number}]: {error}") from error


def _stacked(tower: VisionTower, pixels: list[Tensor]) -> Tensor:
    return tower.normalize(torch.stack(pixels).to(tower.pos_embed.device))


def _packed(tower: VisionTower, pixels: list[Tensor]) -> PackedPatches:
    device = tower.pos_embed.device
    return PackedPatches.from_images([tower.normalize(image.to(device)) for image in pixels], tower.config.patch)
