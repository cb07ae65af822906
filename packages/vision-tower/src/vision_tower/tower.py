"""The tower: patches, positions, blocks, and the class token after the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import Block, initialize
from .config import Resolution, VisionTowerConfig, as_pair, grid_of
from .patches import resample_position_table
from .rotary import rotary_table


class VisionTower(nn.Module):
    """EVA02 image encoder (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389) with no head: class token out.

    Parameters carry the names of timm's `eva02_large_patch14_clip_224(num_classes=0)`, and the numbers are the same.
    Under `torch.device("meta")` it is built, and its resolution set, without allocating anything.
    """

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.width))
        self.patch_embed = PatchEmbed(as_pair(config.resolution), config.patch, embed_dim=config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        initialize(self.blocks)

    def forward(self, images: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Embeds normalised images.

        images  `[N, 3, H, W]` floating point, of exactly the resolution that is set, after `normalize`
        keep    `[N, K]` int64, the patches that stay under patch dropout (`patch_keep_indices`); None keeps all

        Returns float32 `[N, width]`, pooled and not L2-normalised, under autocast too. Raises ValueError for images of
        another size or kind.
        """
        self._check(images, keep)
        config = self.config
        # Made anew at each call: microseconds, and no buffer that `.to(bfloat16)` rounds or a meta device leaves empty.
        table = rotary_table(
            config.grid, config.head_dim, reference=config.reference_grid, theta=config.rope_theta, device=images.device
        )
        x = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype)) + self.pos_embed[:, 1:]
        if keep is None:
            rotary = table[None]
        else:  # patches leave before the blocks, and take their rows of the table with them
            rows = keep + torch.arange(len(keep), device=keep.device)[:, None] * config.num_patches
            x = x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, keep.shape)
            rotary = table[nn.functional.pad(keep + 1, (1, 0))]
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([class_token.to(x.dtype), x], dim=1)
        rotary = rotary.unsqueeze(2)  # one turn for all heads
        recompute = config.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            class_only = block is self.blocks[-1]
            if recompute:
                # no block draws random numbers, so there is no generator state to keep
                x = checkpoint(block, x, rotary, class_only, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotary, class_only)
        return self.norm(x[:, 0]).float()

    def _check(self, images: Tensor, keep: Tensor | None) -> None:
        height, width = as_pair(self.config.resolution)
        found = tuple(images.shape[-2:])
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; expected floating point [N, 3, {height}, {width}], "
                "as preprocess and normalize make them"
            )
        if found != (height, width):
            raise ValueError(
                f"images are {found[0]}x{found[1]} pixels (height x width), and this tower is set to {height}x{width}; "
                f"resize the images, or call tower.set_resolution({found})"
            )
        if keep is not None and (keep.ndim != 2 or len(keep) != len(images) or keep.dtype != torch.int64):
            raise ValueError(
                f"keep is {keep.dtype} {list(keep.shape)}; expected int64 [{len(images)}, K], from patch_keep_indices"
            )

    @torch.no_grad()
    def set_resolution(self, resolution: Resolution) -> VisionTower:
        """Sets the input's size in place, in pixels: one number or (height, width). Returns the tower.

        The absolute position table is resampled as EVA does (`resample_position_table`), and rotary positions span the
        reference grid again. Sides that are no multiple of the patch lose their trailing pixels. The resolution that is
        already set changes nothing.

        Where the grid changes, `pos_embed` is a *new* Parameter (same name, dtype, device and requires_grad, no
        gradient): an optimizer that held the old one must be rebuilt, and its moments resampled by name. Below one
        patch it raises ValueError and leaves the tower as it was.
        """
        old_grid, new_grid = self.config.grid, grid_of(resolution, self.config.patch)
        if new_grid != old_grid:
            table = resample_position_table(self.pos_embed, old_grid, new_grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.patch_embed.set_input_size(as_pair(resolution))
        self.config = replace(self.config, resolution=resolution)
        return self

    @property
    def num_layers(self) -> int:
        return self.config.layers

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth, for layer-wise learning-rate decay: 0 for the patch embedding, class token and
        position table, 1 … layers for the blocks; the final norm goes with the last block, as in timm's
        `group_matcher`."""

        def depth(name: str) -> int:
            parts = name.split(".")
            if parts[0] == "blocks":
                return 1 + int(parts[1])
            return self.num_layers if parts[0] == "norm" else 0

        return {name: depth(name) for name, _ in self.named_parameters()}

    def set_trainable(self, which: Literal["all", "none"]) -> VisionTower:
        """Lets all parameters learn, or none. Returns the tower."""
        if which not in ("all", "none"):
            raise ValueError(f"trainable is {which!r}; a vision tower knows 'all' and 'none'")
        return self.requires_grad_(which == "all")

    def encode(
        self,
        images: Sequence[Any] | Tensor | np.ndarray,
        *,
        truncate_dim: int | None = None,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeds images of any kind and size; see `vision_tower.encoding.encode`."""
        from .encoding import encode

        return encode(
            self,
            images,
            truncate_dim=truncate_dim,
            batch_size=batch_size,
            normalize=normalize,
            show_progress=show_progress,
        )

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors`; see `vision_tower.files.save`."""
        from .files import save

        save(self, path)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], *, checkpointing: bool | None = None) -> VisionTower:
        """Reads a directory of `save_pretrained`; see `vision_tower.files.load`."""
        from .files import load

        return load(path, checkpointing=checkpointing)

    @classmethod
    def from_timm(cls, name: str, **options: Any) -> VisionTower:
        """Takes shape and weights from a timm EVA02 model; see `vision_tower.files.from_timm`."""
        from .files import from_timm

        return from_timm(name, **options)
