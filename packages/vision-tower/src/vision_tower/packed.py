"""Images of different grids in one call: their patches one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .attention import Layout
from .config import grid_of
from .patches import patch_keep_indices, patchify


@dataclass(frozen=True)
class PackedPatches:
    """Patches of N images, each with a grid of its own (NaViT, arXiv 2307.06304); `from_images` makes it.

    patches  `[T, 3 * patch * patch]` floating point, normalised, image after image
    places   `[T]` int64: where a patch stands in its own image's grid, row by row
    grids    (rows, columns) of each image
    lengths  patches of each image; fewer than rows * columns after `drop`
    """

    patches: Tensor
    places: Tensor
    grids: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        t = sum(self.lengths)
        if len(self.grids) != len(self.lengths) or self.places.shape != (t,) or len(self.patches) != t:
            raise ValueError(
                f"{len(self.grids)} grids, {len(self.lengths)} lengths that sum to {t}, {list(self.places.shape)} "
                f"places and {list(self.patches.shape)} patches do not belong together; use PackedPatches.from_images"
            )

    @classmethod
    def from_images(cls, images: Sequence[Tensor], patch: int) -> PackedPatches:
        """From normalised images `[3, H, W]`, each of any size from one patch up; trailing pixels are dropped."""
        if not images:
            raise ValueError("there are no images; expected at least one [3, H, W]")
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
                raise ValueError(
                    f"an image is {image.dtype} {list(image.shape)}; expected floating point [3, H, W], after normalize"
                )
        grids = tuple(grid_of((image.shape[1], image.shape[2]), patch) for image in images)
        lengths = tuple(rows * columns for rows, columns in grids)
        places = torch.cat([torch.arange(n, device=images[0].device) for n in lengths])
        return cls(torch.cat([patchify(image[None], patch)[0] for image in images]), places, grids, lengths)

    def __len__(self) -> int:
        return len(self.grids)

    def to(self, device: torch.device | str) -> PackedPatches:
        return replace(self, patches=self.patches.to(device), places=self.places.to(device))

    def drop(self, seeds: Tensor | Sequence[int], drop_rate: float) -> PackedPatches:
        """Patch dropout: every image loses the same share, chosen by its own seed alone (`patch_keep_indices`)."""
        if len(seeds) != len(self):
            raise ValueError(f"there are {len(seeds)} seeds for {len(self)} images; expected one for each")
        starts = accumulate(self.lengths, initial=0)
        kept = [
            patch_keep_indices(seeds[i : i + 1], length, drop_rate)[0].to(self.places.device) + start
            for i, (length, start) in enumerate(zip(self.lengths, starts, strict=False))
        ]
        rows = torch.cat(kept)
        return replace(self, patches=self.patches[rows], places=self.places[rows], lengths=tuple(map(len, kept)))

    def arrange(self) -> tuple[Tensor, Layout, Tensor]:
        """How the tower lines the tokens up: images by length, so that equal ones lie together, each behind its class
        token.

        Returns the tokens' order, int64 `[N + T]`, an index into [N class tokens, T patches]; the layout of that order;
        and the images' way back to theirs, int64 `[N]`.
        """
        device = self.places.device
        images = sorted(range(len(self)), key=lambda i: self.lengths[i])
        starts = list(accumulate(self.lengths, initial=len(self)))
        rows = [torch.tensor([i, *range(starts[i], starts[i + 1])], device="cpu") for i in images]
        layout = Layout(tuple(1 + self.lengths[i] for i in images), device)
        return torch.cat(rows).to(device), layout, torch.tensor(images, device="cpu").argsort().to(device)
