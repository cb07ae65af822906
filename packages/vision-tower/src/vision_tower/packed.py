"""Images of different grids in one call: their patches one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from vision_tower.config import grid_of
from vision_tower.patches import patch_keep_indices, patchify


@dataclass(frozen=True)
class PackedPatches:
    """Patches of N images, each with its own grid (NaViT, arXiv 2307.06304); made by `from_images`.

    Args:
        patches: `[T, 3 * patch * patch]` floating point, normalised, image after image.
        places: int64 `[T]`, each patch's place in its image's grid, row by row.
        grids: (rows, columns) of each image.
        lengths: patches of each image; fewer than rows * columns after `drop`.

    Raises:
        ValueError: parts that do not fit together.
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
        """Packs normalised images `[3, H, W]`, each of any size from one patch up; trailing pixels are dropped.

        Raises:
            ValueError: no image, or one of another kind.
        """
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
        """N, the number of images."""
        return len(self.grids)

    def to(self, device: torch.device | str) -> PackedPatches:
        """The same patches on another device."""
        return replace(self, patches=self.patches.to(device), places=self.places.to(device))

    def drop(self, seeds: Tensor | Sequence[int], drop_rate: float) -> PackedPatches:
        """Patch dropout: every image loses the same share, chosen by its own seed alone (`patch_keep_indices`).

        Raises:
            ValueError: not one seed for each image.
        """
        if len(seeds) != len(self):
            raise ValueError(f"there are {len(seeds)} seeds for {len(self)} images; expected one for each")
        starts = accumulate(self.lengths, initial=0)
        kept = [
            patch_keep_indices(seeds[i : i + 1], length, drop_rate)[0].to(self.places.device) + start
            for i, (length, start) in enumerate(zip(self.lengths, starts, strict=False))
        ]
        rows = torch.cat(kept)
        return replace(self, patches=self.patches[rows], places=self.places[rows], lengths=tuple(map(len, kept)))

    def by_length(self) -> tuple[Tensor, ByLength, Tensor]:
        """The order in which the tower computes tokens: images sorted by length, each behind its class token.

        Returns:
            The tokens' order, int64 `[N + T]`, an index into [N class tokens, T patches]; the layout of that order; and
            the index that restores the order of the images, int64 `[N]`.
        """
        device = self.places.device
        images = sorted(range(len(self)), key=lambda i: self.lengths[i])
        starts = list(accumulate(self.lengths, initial=len(self)))
        rows = [torch.tensor([i, *range(starts[i], starts[i + 1])], device="cpu") for i in images]
        layout = ByLength(tuple(1 + self.lengths[i] for i in images), device)
        return torch.cat(rows).to(device), layout, torch.tensor(images, device="cpu").argsort().to(device)


@dataclass(frozen=True)
class ByLength:
    """A packed batch sorted by length, class token first in each image: images of one length form a plain batch.

    Args:
        lengths: tokens of each image, its class token included, ascending.
        device: of the tokens.
    """

    lengths: tuple[int, ...]
    device: torch.device

    def prepare(self) -> None:
        """Makes what blocks read before the first of them does: compiled blocks can read it, but not make it."""
        _ = self.cu_seqlens, self.class_rows, self.groups

    @property
    def max_seqlen(self) -> int:
        """Length of the longest image."""
        return self.lengths[-1]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each image starts, then the number of tokens: int32 `[N + 1]`."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def class_rows(self) -> Tensor:
        """Each image's first token, int64 `[N]`."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def groups(self) -> list[tuple[slice, slice, int]]:
        """(images, tokens, length) of each run of images of one length."""
        counts = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        images = pairwise(accumulate((n for _, n in counts), initial=0))
        tokens = pairwise(accumulate((n * length for length, n in counts), initial=0))
        return [(slice(*i), slice(*t), length) for i, t, (length, _) in zip(images, tokens, counts, strict=True)]

    @cached_property
    def self_mask(self) -> Any:
        """xFormers' mask for the attention of all tokens; every block but the last shares it."""
        return self._block_diagonal(self.lengths)

    @cached_property
    def class_mask(self) -> Any:
        """xFormers' mask for the attention of the class tokens alone."""
        return self._block_diagonal((1,) * len(self.lengths))

    def _block_diagonal(self, queries: tuple[int, ...]) -> Any:
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(list(queries), list(self.lengths), device=self.device)
