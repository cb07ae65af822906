"""The shape of an EVA02 vision tower, as one frozen dataclass whose errors name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

Resolution = int | tuple[int, int]

ATTENTION = ("sdpa", "xformers", "flash", "auto")


def as_pair(resolution: Resolution, name: str = "resolution") -> tuple[int, int]:
    """`(height, width)` in pixels, from one positive integer (a square) or a pair of them."""
    pair = tuple(resolution) if isinstance(resolution, tuple | list) else (resolution, resolution)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"{name} is {resolution!r}; expected a positive number of pixels or a (height, width) pair")
    return pair


def grid_of(resolution: Resolution, patch: int) -> tuple[int, int]:
    """Patches `(rows, columns)` of an image. Trailing pixels that fill no patch are dropped: 384 gives 27 by 14."""
    height, width = as_pair(resolution)
    if height < patch or width < patch:
        raise ValueError(
            f"resolution {height}x{width} is below one patch of {patch}x{patch} pixels; "
            f"use at least {patch} pixels a side, or a tower with a smaller patch"
        )
    return height // patch, width // patch


@dataclass(frozen=True)
class VisionTowerConfig:
    """Shape of a tower; the defaults are EVA02-L/14 at 224 pixels, 303,317,952 parameters.

    resolution        pixels, one number or (height, width); `VisionTower.set_resolution` changes it later
    patch             pixels along a patch's side
    width             embedding dimensions; every head has width / heads of them, a multiple of 4
    layers, heads     depth, and attention heads in each layer
    mlp_ratio         SwiGLU's hidden size is floor(width * mlp_ratio), unless
    hidden            states it outright (2730 for L/14 either way)
    reference_grid    the grid to which rotary positions are rescaled (EVA's `pt_hw_seq_len` with `intp_freq`);
                      None leaves them at 0, 1, 2, …
    rope_theta        base of the rotary frequencies
    attention_norm    LayerNorm before attention's output projection: in EVA-CLIP's EVA02, absent from the MIM models
    layer_norm_eps    epsilon of every LayerNorm
    checkpointing     recompute the blocks in the backward pass: less memory, about a third more time
    attention         "sdpa" is PyTorch's own; "xformers" and "flash" (the flash-attn package) need a GPU and say so
                      where they cannot be had; "auto" is xFormers where it is installed and the tower is on a GPU. No
                      matter of the weights: it is not saved with them
    """

    resolution: Resolution = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 2.6667
    hidden: int | None = None
    reference_grid: int | None = 16
    rope_theta: float = 10_000.0
    attention_norm: bool = True
    layer_norm_eps: float = 1e-6
    checkpointing: bool = False
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("patch", "width", "layers", "heads", "hidden", "reference_grid"):
            value = getattr(self, name)
            if value is None and name in ("hidden", "reference_grid"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
        for name in ("mlp_ratio", "rope_theta", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; expected a positive number")
        for name in ("attention_norm", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention is {self.attention!r}; expected one of {', '.join(ATTENTION)}")
        if isinstance(self.resolution, list):  # as JSON and YAML give it
            object.__setattr__(self, "resolution", tuple(self.resolution))
        grid_of(self.resolution, self.patch)
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"width {self.width} over heads {self.heads} gives {self.width / self.heads:g} dimensions a head; "
                "2D rotary positions need a multiple of 4"
            )
        if self.mlp_hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves no hidden unit; raise it")

    @classmethod
    def eva02_large(cls, resolution: Resolution = 224, **changes: Any) -> VisionTowerConfig:
        """EVA02-L/14, as jina-clip-v2 starts from (EVA-CLIP, arXiv 2303.15389)."""
        return cls(resolution=resolution, **changes)

    @classmethod
    def eva02_base(cls, resolution: Resolution = 224, **changes: Any) -> VisionTowerConfig:
        """EVA02-B/16 of EVA-CLIP."""
        return cls(**{"resolution": resolution, "patch": 16, "width": 768, "layers": 12, "heads": 12, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionTowerConfig:
        """From plain values, as JSON and YAML give them; an unknown key is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown vision tower setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return grid_of(self.resolution, self.patch)

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        return self.hidden if self.hidden is not None else int(self.width * self.mlp_ratio)

    def timm_arguments(self) -> dict[str, Any]:
        """Keyword arguments with which timm's `eva02_large_patch14_clip_224` takes this shape and these weights.
        (timm takes no `layer_norm_eps`; its own is 1e-6, as ours is by default.)"""
        reference = self.grid if self.reference_grid is None else (self.reference_grid, self.reference_grid)
        return {
            "num_classes": 0,
            "img_size": as_pair(self.resolution),
            "patch_size": self.patch,
            "embed_dim": self.width,
            "depth": self.layers,
            "num_heads": self.heads,
            # timm rounds width * ratio down; the half keeps a ratio of two integers from landing one below.
            "mlp_ratio": (self.mlp_hidden + 0.5) / self.width,
            "scale_attn_inner": self.attention_norm,
            "ref_feat_shape": reference,  # not None, which timm.create_model would take for "the entry's own"
            "rope_temperature": self.rope_theta,
        }
