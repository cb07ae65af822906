"""The tower: patches, positions, blocks, and the class token after the final norm."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attend, Layout, resolve_backend
from .blocks import Block, initialize
from .config import Resolution, VisionTowerConfig, as_pair, grid_of
from .packed import PackedPatches
from .patches import patchify, resample_position_table
from .preprocess import normalize, preprocess
from .rotary import rotary_table


class PatchProjection(nn.Conv2d):
    """A convolution's weights under its name, applied to patches `[..., 3 * patch * patch]` that are cut out already.

    A product instead of the convolution takes 0.9 of its time in float32 and 0.4 in bfloat16 (forward and backward, one
    thread of an AVX2 processor), and dropped patches are never computed.
    """

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """timm's name for the one projection in it."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, patch, patch)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class VisionTower(nn.Module):
    """EVA02 image encoder (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389) with no head: class token out.

    Parameters carry the names of timm's `eva02_large_patch14_clip_224(num_classes=0)`, and the numbers are the same.
    Under `torch.device("meta")` it is built, and its resolution set, without allocating anything.
    """

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self._compile_options: dict[str, Any] | None = None
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.width))
        self.patch_embed = PatchEmbed(config.patch, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        initialize(self.blocks)

    def forward(
        self, images: Tensor | PackedPatches, *, keep: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Embeds normalised images.

        images  `[N, 3, H, W]` floating point, of exactly the resolution that is set, after `normalize`; or N images
                of any grids as `PackedPatches`
        keep    `[N, K]` int64, the patches that stay under patch dropout (`patch_keep_indices`); None keeps all.
                Packed images have `PackedPatches.drop` instead
        attend  computes attention, in place of what `config.attention` and the device choose

        Returns float32 `[N, width]`, pooled and not L2-normalised, under autocast too (float64 from a float64 tower).
        Raises ValueError for images of another size or kind, or attention that this device does not have.
        """
        backend = attend or resolve_backend(self.config.attention, self.pos_embed.device)
        layout = restore = None
        if isinstance(images, PackedPatches):
            x, rotary, layout, restore = self._embed_packed(images, keep)
        else:
            x, rotary = self._embed(images, keep)
        recompute = self.config.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            rest = (rotary.unsqueeze(-3), backend, layout, block is self.blocks[-1])  # one turn for all heads
            if recompute:
                # no block draws random numbers, so there is no generator state to keep
                x = checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *rest)
        x = self.norm(x if restore is None else x.index_select(0, restore)).flatten(0, -2)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _embed(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens `[N, T, width]` and their rotary table."""
        self._check(images, keep)
        rotary = self._rotary(self.config.grid)[None]
        patches, positions = patchify(images, self.config.patch), self.pos_embed[:, 1:]
        if keep is not None:  # patches leave before any product, and take their rows of both tables with them
            rows = keep + torch.arange(len(keep), device=keep.device)[:, None] * self.config.num_patches
            patches = patches.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, keep.shape)
            positions = F.embedding(keep, positions[0])  # indexing, but its gradient is summed in a fixed order
            rotary = rotary[0, F.pad(keep + 1, (1, 0))]
        x = self.patch_embed(patches) + positions
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([class_token.to(x.dtype), x], dim=1), rotary

    def _embed_packed(self, packed: PackedPatches, keep: Tensor | None) -> tuple[Tensor, Tensor, Layout, Tensor]:
        """Tokens `[N + T, width]` in the order of the layout, their rotary table, the layout and the order of the
        images. The position table is resampled to each grid, and rotary positions span the reference grid in each."""
        config = self.config
        if keep is not None:
            raise ValueError("keep is for images of one size; use PackedPatches.drop")
        if packed.patches.shape[1] != 3 * config.patch**2:
            raise ValueError(
                f"a packed patch has {packed.patches.shape[1]} numbers, this tower's has 3 x {config.patch} x "
                f"{config.patch} = {3 * config.patch**2}; pack with patch={config.patch}"
            )
        grids = list(dict.fromkeys(packed.grids))
        tables = [resample_position_table(self.pos_embed, config.grid, grid)[0, 1:] for grid in grids]
        start = dict(zip(grids, accumulate(map(len, tables), initial=0), strict=False))
        device = packed.places.device
        starts = torch.tensor([start[grid] for grid in packed.grids], device="cpu")
        rows = packed.places + starts.repeat_interleave(torch.tensor(packed.lengths, device="cpu")).to(device)
        x = self.patch_embed(packed.patches) + F.embedding(rows, torch.cat(tables))
        class_token = (self.cls_token + self.pos_embed[:, :1])[0].expand(len(packed), -1)
        order, layout, restore = packed.arrange()
        turns = [self._rotary(grid) for grid in grids]
        rotary = torch.cat([turns[0][:1].expand(len(packed), -1, -1), torch.cat([t[1:] for t in turns])[rows]])
        return torch.cat([class_token.to(x.dtype), x]).index_select(0, order), rotary[order], layout, restore

    def _rotary(self, grid: tuple[int, int]) -> Tensor:
        # Made anew at each call: microseconds, and no buffer that `.to(bfloat16)` rounds or a meta device leaves empty.
        reference, theta = self.config.reference_grid, self.config.rope_theta
        device = self.pos_embed.device
        return rotary_table(grid, self.config.head_dim, reference=reference, theta=theta, device=device)

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

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_resolution(self, resolution: Resolution) -> VisionTower:
        """Sets the input's size in place, in pixels: one number or (height, width). Returns the tower.

        The absolute position table is resampled as EVA does (`resample_position_table`), and rotary positions span the
        reference grid again. Sides that are no multiple of the patch lose their trailing pixels. The resolution that is
        already set changes nothing.

        Where the grid changes, `pos_embed` is a *new* Parameter (same name, dtype, device and requires_grad, no
        gradient): an optimizer that held the old one must be rebuilt, and its moments resampled by name
        (`resample_optimizer_state`). Below one patch it raises ValueError and leaves the tower as it was.
        """
        old_grid, new_grid = self.config.grid, grid_of(resolution, self.config.patch)
        if new_grid != old_grid:
            table = resample_position_table(self.pos_embed, old_grid, new_grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.config = replace(self.config, resolution=resolution)
        return self

    def compile_blocks(self, **options: Any) -> VisionTower:
        """Compiles every block in place with `torch.compile(**options)`, and returns the tower.

        Block by block, a deep tower compiles as fast as a shallow one, checkpointing goes on as before, and names of
        parameters stay. What is compiled is this process's, and not saved. It raises Dynamo's limit of graphs for one
        function, which it has for the process, to 64. Packed images go through in pieces, compiled anew for every
        mixture of lengths: their gain is small.
        """
        # Patch dropout or none, gradients or none, all tokens or the class token, a last smaller batch, another
        # resolution: all blocks are one function to Dynamo, and past its eight graphs it would go on uncompiled.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        for block in self.blocks:
            block.compile(**options)
        self._compile_options = options
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compile_options": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionTower:
        """A copy of a module loses what is compiled, without a word; this one is compiled as the tower is."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        return copied if self._compile_options is None else copied.compile_blocks(**self._compile_options)

    def preprocess(self, image: Any) -> Tensor:
        """`vision_tower.preprocess` to the resolution that is set, as these weights want it: uint8 `[3, H, W]`."""
        config = self.config
        return preprocess(
            image,
            config.resolution,
            crop_pct=config.crop_pct,
            crop_mode=config.crop_mode,
            interpolation=config.interpolation,
            fill=config.mean,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """`vision_tower.normalize` with the mean and std of these weights: float32 from uint8."""
        return normalize(images, self.config.mean, self.config.std)

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

    def encode(self, images: Iterable[Any] | Tensor | np.ndarray, **options: Any) -> np.ndarray:
        """Embeds images of any kind and size; see `vision_tower.encoding.encode`, whose options these are."""
        from .encoding import encode

        return encode(self, images, **options)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors`; see `vision_tower.files.save`."""
        from .files import save

        save(self, path)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **options: Any) -> VisionTower:
        """Reads a directory of `save_pretrained`, timm or jina-clip-v2, or a file of EVA-CLIP or open_clip; see
        `vision_tower.files.load`."""
        from .files import load

        return load(path, **options)

    @classmethod
    def from_timm(cls, name: str, **options: Any) -> VisionTower:
        """Takes shape and weights from a timm EVA02 model; see `vision_tower.files.from_timm`."""
        from .files import from_timm

        return from_timm(name, **options)
