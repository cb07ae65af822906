"""The tower: images in, one pooled embedding per image out."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_tower import pretrained
from vision_tower.attention import Attend, choose_backend
from vision_tower.blocks import Block, PatchEmbed, initialize, lowered
from vision_tower.config import Resolution, VisionTowerConfig, as_pair, grid_of
from vision_tower.encode import encode as _encode
from vision_tower.lora import is_adapter, merged_state_dict
from vision_tower.packed import ByLength, PackedPatches
from vision_tower.patches import patchify, resample_position_table
from vision_tower.positions import rotary_table
from vision_tower.preprocess import MAX_PIXELS, normalize, preprocess
from vision_tower.projector import is_projector, make_projector


class VisionTower(nn.Module):
    """An EVA02 image encoder without a head (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv 2303.15389).

    Parameters have the names of timm's `eva02_large_patch14_clip_224(num_classes=0)`, and outputs are the same. Built
    under `torch.device("meta")`, it allocates nothing, nor does setting its resolution.

    Args:
        config: its shape.
    """

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.width))
        self.patch_embed = PatchEmbed(config.patch, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.projector = make_projector(config)
        if not self.pos_embed.is_meta:  # drawing numbers there imports PyTorch's compiler, and is for nothing
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            initialize(self.blocks)
        self.configure()

    def forward(
        self, images: Tensor | PackedPatches, *, keep: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Embeds N normalised images.

        Args:
            images: `[N, 3, H, W]` floating point, of exactly the resolution that is set, after `normalize`; or N images
                of any grids as `PackedPatches`.
            keep: int64 `[N, K]`, the patches that stay under patch dropout (`patch_keep_indices`); None for all. Packed
                images have `PackedPatches.drop` instead.
            attend: computes attention, instead of what `config.attention` and the device choose.

        Returns:
            `[N, config.output_width]`: the class token after the final norm and the projector, if there is one, not
            L2-normalised, float32 under autocast and for bfloat16 weights too (float64 from a float64 tower).

        Raises:
            ValueError: images of another size or kind, or an attention backend that cannot run on this device.
            ImportError: an attention backend that is not installed.
        """
        return self.project(self.pooled(images, keep=keep, attend=attend))

    def project(self, pooled: Tensor) -> Tensor:
        """What the projector makes of rows of `pooled`; the rows themselves if there is none."""
        if self.projector is None:
            return pooled
        projected: Tensor = self.projector(pooled.to(next(self.projector.parameters()).dtype))
        return projected.to(torch.promote_types(projected.dtype, torch.float32))

    def pooled(
        self, images: Tensor | PackedPatches, *, keep: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """`[N, width]`: as `forward`, before the projector."""
        backend = attend or choose_backend(self.config.attention, self.pos_embed.device)
        layout = restore = None
        if isinstance(images, PackedPatches):
            x, rotary, layout, restore = self._embed_packed(images, keep)
            layout.prepare()
        else:
            x, rotary = self._embed(images, keep)
        if not self.config.residual_in_fp32:
            x = lowered(x)
        recompute = self.config.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            rest = (rotary.unsqueeze(-3), backend, layout, block is self.blocks[-1])  # one rotation for all heads
            if recompute:
                # No block draws random numbers, so there is no generator state to keep.
                x = checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *rest)
        out: Tensor = self.norm(x if restore is None else x.index_select(0, restore)).flatten(0, -2)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _embed(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens `[N, T, width]` and their rotary table."""
        self._check(images, keep)
        rotary = self._rotary(self.config.grid)[None]
        patches, positions = patchify(images, self.config.patch), self.pos_embed[:, 1:]
        if keep is not None:  # patches leave before any product, with their rows of both tables
            rows = keep + torch.arange(len(keep), device=keep.device)[:, None] * self.config.num_patches
            patches = torch.unflatten(patches.flatten(0, 1).index_select(0, rows.flatten()), 0, keep.shape)
            positions = F.embedding(keep, positions[0])  # indexing, but its gradient is summed in a fixed order
            rotary = rotary[0, F.pad(keep + 1, (1, 0))]
        x = self.patch_embed(patches) + positions
        count = x.shape[0]  # not len(x), which is a constant to torch.export
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(count, -1, -1)
        return torch.cat([class_token.to(x.dtype), x], dim=1), rotary

    def _embed_packed(self, packed: PackedPatches, keep: Tensor | None) -> tuple[Tensor, Tensor, ByLength, Tensor]:
        """Tokens `[N + T, width]` in the order of the layout, their rotary table, the layout, and the index that
        restores the order of the images. Each grid has its own resampled table and its own rotary positions."""
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
        order, layout, restore = packed.by_length()
        turns = [self._rotary(grid) for grid in grids]
        rotary = torch.cat([turns[0][:1].expand(len(packed), -1, -1), torch.cat([t[1:] for t in turns])[rows]])
        return torch.cat([class_token.to(x.dtype), x]).index_select(0, order), rotary[order], layout, restore

    def _rotary(self, grid: tuple[int, int]) -> Tensor:
        # Computed at each call: microseconds, and no buffer that `.to(bfloat16)` rounds or a meta device leaves empty.
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
        """Sets the size of input images in place, in pixels: one number or (height, width). Returns the tower.

        The position table is resampled as EVA does (`resample_position_table`), and rotary positions span the reference
        grid again. Sides that are no multiple of the patch lose their trailing pixels.

        If the grid changes, `pos_embed` is a *new* Parameter (same name, dtype, device and requires_grad, no gradient):
        rebuild an optimizer that holds the old one, and resample its moments (`resample_optimizer_state`).

        Raises:
            ValueError: less than one patch; the tower stays as it was.
        """
        old_grid, new_grid = self.config.grid, grid_of(resolution, self.config.patch)
        if new_grid != old_grid:
            table = resample_position_table(self.pos_embed, old_grid, new_grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.config = replace(self.config, resolution=resolution)
        return self

    def configure(self, **changes: Any) -> None:
        """Changes settings that no weight depends on: attention, compile, checkpointing, residual_in_fp32.

        Blocks are compiled one by one: a deep tower compiles as fast as a shallow one, checkpointing works as before,
        and names of parameters stay. One graph serves any number of images and patches. Packed images are compiled for
        each mixture of lengths where attention is not one call for all of them, and gain little.

        Raises:
            ValueError: another field of the configuration, or an impossible value.
        """
        settings = {"attention", "compile", "checkpointing", "residual_in_fp32"}
        if unknown := set(changes) - settings:
            raise ValueError(f"{sorted(unknown)} cannot be changed on a tower that exists")
        self.config = replace(self.config, **changes)
        for block in self.blocks:
            block._compiled_call_impl = None
            if self.config.compile:
                block.compile(dynamic=True)
        if self.config.compile:
            # All blocks are one function to Dynamo, which gives up after 8 graphs: too few for patch dropout or none,
            # gradients or none, all tokens or the class token, a smaller last batch, other resolutions.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 64)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy computes as the original does: compiled code is not copied, so the copy compiles its own."""
        cast(Any, super()).__setstate__(state)
        self.configure()

    encode = _encode
    from_pretrained = classmethod(pretrained.load)
    from_timm = classmethod(pretrained.from_timm)
    save_pretrained = pretrained.save

    def preprocess(self, image: Any, *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """`vision_tower.preprocess` to the set resolution, with the settings of these weights: uint8 `[3, H, W]`."""
        config = self.config
        return preprocess(
            image,
            config.resolution,
            crop_pct=config.crop_pct,
            crop_mode=config.crop_mode,
            interpolation=config.interpolation,
            fill=config.mean,
            max_pixels=max_pixels,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """`vision_tower.normalize` with the mean and std of these weights: uint8 to float32."""
        return normalize(images, self.config.mean, self.config.std)

    def joined_linears(self) -> list[tuple[nn.Linear, ...]]:
        """The Linears of the blocks, those of one product together; with an adapter each is by itself. What an engine
        sets as `joined` of a first one computes `x Wᵀ + b` of them all, as a tuple, until it is None."""
        found: list[tuple[nn.Linear, ...]] = []
        for block in cast("list[Block]", list(self.blocks)):
            found += block.joined_linears(block is self.blocks[-1])
        return [(each,) for linears in found for each in linears] if self.config.lora_rank else found

    @property
    def num_layers(self) -> int:
        """Depth of the top block as `layer_ids` counts it."""
        return self.config.layers

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter, for layer-wise learning rates: 0 for the patch embedding, class token and position
        table, 1 to `num_layers` for the blocks; the final norm counts as the last block, as in timm's `group_matcher`,
        and so does a projector."""
        names = [name for name, _ in self.named_parameters()]
        others = {n: self.num_layers for n in names if is_projector(n) or n.startswith("norm.")}
        return {n: 1 + int(n.split(".")[1]) if n.startswith("blocks.") else others.get(n, 0) for n in names}

    def merged(self) -> VisionTower:
        """The tower without its adapter, which is added to a copy of the weights; itself if it has none."""
        if not self.config.lora_rank:
            return self
        with torch.device("meta"):
            tower = VisionTower(replace(self.config, lora_rank=0))
        ours = {parameter.data_ptr() for parameter in self.parameters()}
        weights = merged_state_dict(self).items()
        tower.load_state_dict({n: t.clone() if t.data_ptr() in ours else t for n, t in weights}, assign=True)
        return tower.train(self.training)

    def set_trainable(self, what: Literal["all", "adapters", "projector", "none"]) -> VisionTower:
        """Chooses what learns: all parameters, the adapter and the projector, the projector alone, or none. Returns the
        tower.

        Raises:
            ValueError: another word, or one for what the tower does not have.
        """
        if what not in ("all", "adapters", "projector", "none"):
            known = "'all', 'adapters', 'projector' and 'none'"
            raise ValueError(f"trainable is {what!r}; a vision tower knows {known}")
        if what == "adapters" and not self.config.lora_rank:
            raise ValueError("this tower has no adapter to train; give it a lora_rank, or train 'all'")
        if what == "projector" and not self.config.projector:
            raise ValueError("this tower has no projector to train; give it a projector's width, or train 'all'")
        for name, parameter in self.named_parameters():
            added = (what == "adapters" and is_adapter(name)) or (what != "none" and is_projector(name))
            parameter.requires_grad_(what == "all" or added)
        return self
