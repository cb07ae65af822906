"""Configuration of an EVA02 vision tower; errors name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from operator import index
from typing import Any

Resolution = int | tuple[int, int]

BACKENDS = ("auto", "flash-attn", "xformers", "sdpa")  # "auto", then what it may be; see vision_tower.attention
OF_THE_MACHINE = ("attention", "compile", "residual_in_fp32")  # fields that a model's directory does not have
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # Pillow's

PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")  # fields that `preprocess` and timm share

# CLIP's (Radford et al., arXiv 2103.00020), for RGB in 0 … 1; EVA-CLIP and jina-clip-v2 keep them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


MOST_LAYERS, LARGEST = 1000, 2**24  # beyond every model that exists; a foreign file's billion would be built first


def whole(value: Any) -> int | None:
    """`value` as an int (numpy's and tensors' integers too), or None for anything else, True and False included."""
    try:
        number = index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool") else number


def as_pair(resolution: Resolution, name: str = "resolution") -> tuple[int, int]:
    """`(height, width)` in pixels, from one positive integer (a square) or a pair of them."""
    sides = resolution if isinstance(resolution, tuple | list) else (resolution, resolution)
    pair = [side for side in map(whole, sides) if side is not None and 0 < side <= 2**16]
    if len(sides) != 2 or len(pair) != 2:
        raise ValueError(f"{name} is {resolution!r}; expected a positive number of pixels or a (height, width) pair")
    return pair[0], pair[1]


def grid_of(resolution: Resolution, patch: int) -> tuple[int, int]:
    """Patches `(rows, columns)` of an image; trailing pixels that fill no patch are dropped: 384 holds 27 of 14."""
    height, width = as_pair(resolution)
    if height < patch or width < patch:
        raise ValueError(
            f"resolution {height}x{width} is below one patch of {patch}x{patch} pixels; "
            f"use at least {patch} pixels a side, or a tower with a smaller patch"
        )
    return height // patch, width // patch


def is_number(value: Any) -> bool:
    """Whether `value` is a real number (numpy's too) that a float holds, and not True or False."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return bool(real and -1e300 < value < 1e300)


def check_crop(crop_pct: float, crop_mode: str, interpolation: str) -> None:
    """Raises ValueError for settings that `preprocess` does not know."""
    if not is_number(crop_pct) or not 0.001 <= crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct!r}; expected 0.001 <= crop_pct <= 1")
    for name, value, known in (
        ("crop_mode", crop_mode, CROP_MODES),
        ("interpolation", interpolation, INTERPOLATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")


@dataclass(frozen=True)
class VisionTowerConfig:
    """Shape of a tower and preprocessing of its images. The defaults are EVA02-L/14 of EVA-CLIP at 224 pixels,
    303,317,952 parameters.

    Args:
        resolution: pixels, one number or (height, width); `VisionTower.set_resolution` changes it later.
        patch: side of a patch, in pixels.
        width: channels of a token and, without a projector, of an embedding; each head has width / heads of them, a
            multiple of 4.
        layers: number of blocks.
        heads: attention heads of each block.
        mlp_ratio: sets `mlp_width` to floor(width * mlp_ratio) where that is None.
        mlp_width: hidden channels of SwiGLU. It is always a number afterwards: 2730 for L/14.
        reference_grid: grid to which rotary positions are rescaled (EVA's `pt_hw_seq_len` with `intp_freq`); None
            leaves them at 0, 1, 2, …
        rope_theta: base of the rotary frequencies.
        attention_norm: LayerNorm before attention's output projection; EVA-CLIP's EVA02 has it, MIM models do not.
        layer_norm_eps: of every LayerNorm.
        mean, std: of each RGB channel in 0 … 1, as the weights were trained; CLIP's by default.
        crop_pct, crop_mode, interpolation: how an image is brought to its size (`preprocess`), in timm's terms.
        lora_rank: rank of the adapter (`lora`) on every product of the blocks; 0 for none.
        lora_alpha: the adapter is scaled by `lora_alpha / lora_rank`.
        projector: width of what a projector after the final norm gives (`projector`); 0 for none.
        projector_hidden: hidden units of a projector of two products with a GELU between them; 0 for one product.
        checkpointing: recompute the blocks in the backward pass: less memory, about a third more time.
        attention: one of `BACKENDS`. "sdpa" is PyTorch's; "xformers" and "flash-attn" need a GPU and the package;
            "auto" is xFormers where it is installed and the tower is on a GPU. Like the next two a setting of the
            machine: none of them is written to a model's directory.
        compile: run each block through `torch.compile`.
        residual_in_fp32: under autocast keep the residual stream in float32, as autocast itself does; otherwise it has
            autocast's dtype, which is faster and less exact.

    Raises:
        ValueError: an impossible value; the message names the field.
    """

    resolution: Resolution = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 2.6667
    mlp_width: int = None  # type: ignore[assignment]  # None becomes a number in __post_init__
    reference_grid: int | None = 16
    rope_theta: float = 10_000.0
    attention_norm: bool = True
    layer_norm_eps: float = 1e-6
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    lora_rank: int = 0
    lora_alpha: float = 1.0
    projector: int = 0
    projector_hidden: int = 0
    checkpointing: bool = False
    attention: str = "sdpa"
    compile: bool = False
    residual_in_fp32: bool = True

    def __post_init__(self) -> None:
        self._check_whole_numbers()
        self._check_images()
        for name in ("mlp_ratio", "rope_theta", "layer_norm_eps", "lora_alpha"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; expected a positive number")
            object.__setattr__(self, name, float(value))
        for name in ("attention_norm", "checkpointing", "compile", "residual_in_fp32"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        if self.attention not in BACKENDS:
            raise ValueError(f"attention is {self.attention!r}; expected one of {', '.join(BACKENDS)}")
        self._check_shape()

    def _check_whole_numbers(self) -> None:
        for name in ("patch", "width", "layers", "heads", "mlp_width", "reference_grid"):
            value = getattr(self, name)
            if value is None and name in ("mlp_width", "reference_grid"):
                continue
            if (number := whole(value)) is None or number < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
            if number > (most := MOST_LAYERS if name == "layers" else LARGEST):
                raise ValueError(f"{name} is {value!r}; expected at most {most:,}")
            object.__setattr__(self, name, number)
        if (rank := whole(self.lora_rank)) is None or not 0 <= rank <= 2**16:
            raise ValueError(f"lora_rank is {self.lora_rank!r}; expected an integer from 0 to {2**16}")
        object.__setattr__(self, "lora_rank", rank)
        for name in ("projector", "projector_hidden"):
            if (number := whole(value := getattr(self, name))) is None or not 0 <= number <= LARGEST:
                raise ValueError(f"{name} is {value!r}; expected an integer from 0 to {LARGEST:,}")
            object.__setattr__(self, name, number)
        if self.projector_hidden and not self.projector:
            raise ValueError(
                f"projector_hidden is {self.projector_hidden} and projector 0; state the projector's width"
            )

    def _check_images(self) -> None:
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            numbers = tuple(numbers) if isinstance(numbers, tuple | list) else (numbers,)
            fits = all(is_number(n) and 0 <= float(n) <= 1 for n in numbers)
            if len(numbers) != 3 or not fits or (name == "std" and 0 in numbers):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected three numbers within 0 … 1, of R, G and B"
                )
            object.__setattr__(self, name, tuple(map(float, numbers)))
        check_crop(self.crop_pct, self.crop_mode, self.interpolation)
        object.__setattr__(self, "crop_pct", float(self.crop_pct))

    def _check_shape(self) -> None:
        grid_of(self.resolution, self.patch)
        height, width = as_pair(self.resolution)
        pair = isinstance(self.resolution, tuple | list)  # a list, as JSON and YAML give it
        object.__setattr__(self, "resolution", (height, width) if pair else height)
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"width {self.width} over heads {self.heads} gives {self.width / self.heads:g} dimensions a head; "
                "2D rotary positions need a multiple of 4"
            )
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", int(self.width * self.mlp_ratio))
        if not 1 <= self.mlp_width <= LARGEST:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} of width {self.width} gives {self.mlp_width} hidden units; expected 1 to "
                f"{LARGEST:,}"
            )

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
        """From plain values, such as JSON's and YAML's; the error for an unknown key lists the known ones."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown vision tower setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def changed(self, values: Mapping[str, Any]) -> VisionTowerConfig:
        """With other settings; errors as `from_dict`."""
        if "mlp_ratio" in values:
            values = {"mlp_width": None, **values}
        return self.from_dict({**asdict(self), **values})

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
    def output_width(self) -> int:
        """Numbers of an embedding."""
        return self.projector or self.width

    def timm_arguments(self) -> dict[str, Any]:
        """Keyword arguments for timm's `eva02_large_patch14_clip_224` that give this shape and fit these weights.

        timm takes no `layer_norm_eps`: its own is 1e-6, our default.
        """
        reference = self.grid if self.reference_grid is None else (self.reference_grid, self.reference_grid)
        return {
            "num_classes": 0,
            "img_size": as_pair(self.resolution),
            "patch_size": self.patch,
            "embed_dim": self.width,
            "depth": self.layers,
            "num_heads": self.heads,
            # timm rounds width * ratio down; the half keeps a ratio of two integers from landing one below.
            "mlp_ratio": (self.mlp_width + 0.5) / self.width,
            "scale_attn_inner": self.attention_norm,
            "ref_feat_shape": reference,  # not None: timm.create_model would then take the entry's own
            "rope_temperature": self.rope_theta,
        }
