"""Weights of other projects: EVA-CLIP, open_clip, timm and jina-clip-v2 files, told apart by their keys.

Only tensors are read: safetensors, or `torch.load(weights_only=True)`, which refuses anything that could run code.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vision_tower.config import Resolution, VisionTowerConfig, grid_of
from vision_tower.errors import WeightsError

# Every layout has this tensor once, with the prefix of the image half before its name.
_PATCH = "patch_embed.proj.weight"

# EVA's names and timm's: whole components of a key, so that no pattern matches another's result.
_RENAMED = {
    "attn.inner_attn_ln": "attn.norm",
    "mlp.ffn_ln": "mlp.norm",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
}
_RENAME = re.compile(r"(?<=\.)(" + "|".join(map(re.escape, _RENAMED)) + r")(?=\.|$)")

_EVA_NAMES = {ours: theirs for theirs, ours in _RENAMED.items()}
_RENAME_BACK = re.compile(r"(?<=\.)(" + "|".join(map(re.escape, _EVA_NAMES)) + r")(?=\.|$)")

# Not part of an encoder: heads of CLIP, classification and masked-image training.
_DROPPED = re.compile(r"(head|lm_head)\..*|mask_token|.*\brope\b.*")

JINA_LICENCE = (
    "these look like jina-clip-v2's weights; as published they carry CC-BY-NC-4.0, which forbids commercial use, of "
    "what is trained from them too"
)


def read_image_half(path: Path) -> dict[str, Tensor]:
    """The image tower's tensors of a file, without their prefix and otherwise unchanged.

    A whole model's text half is never read from a safetensors file, and only mapped into memory from a `.pt`.

    Raises:
        WeightsError: a file that is broken, unsafe, or holds no image tower; the message names it.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                prefix = _prefix(keys, path)
                found = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise WeightsError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from error
    else:
        weights = _unpickle(path)
        keys = list(weights)
        prefix = _prefix(keys, path)
        found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if prefix.endswith("vision_model.") and any("text_model.transformer.roberta." in key for key in keys):
        warnings.warn(f"{path}: {JINA_LICENCE}", stacklevel=3)  # the caller of from_pretrained
    return found


def _unpickle(path: Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            found = torch.load(path, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(path, **options)  # torch's format before 1.6 cannot be mapped
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise WeightsError(
            f"{path} is not a file of tensors alone ({reason}), and what else it holds could run code. If it is meant "
            "to hold more and you trust it, load it yourself, and save its tensors with safetensors"
        ) from error
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise WeightsError(f"{path} cannot be read by torch.load ({error}); copy or download it again") from error
    for wrapper in ("model_ema", "model", "module", "state_dict"):  # trainers save more than the weights
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} holds a {type(found).__name__}; expected a dictionary of tensors")
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if odd := sorted(key for key, value in tensors.items() if not _is_whole(value)):
        raise WeightsError(
            f"{path} has {', '.join(odd[:5])} sparse, quantized, or without all their numbers; expected plain tensors"
        )
    return tensors


def _is_whole(tensor: Tensor) -> bool:
    """Whether a file has every number of a tensor: a pickle may state any shape over a storage of one number."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _prefix(keys: list[str], path: Path) -> str:
    prefixes = [key.removesuffix(_PATCH) for key in keys if key == _PATCH or key.endswith("." + _PATCH)]
    if len(prefixes) != 1:
        raise WeightsError(
            f"{path} has {len(prefixes)} image towers: expected one key that ends in {_PATCH}, found "
            f"{', '.join(map(repr, prefixes or sorted(keys)[:5])) or 'nothing'}"
        )
    return prefixes[0]


def to_timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under timm's names, without heads.

    A tower of masked-image training or classification that averages patches has its final norm as `fc_norm`; here it
    becomes the class token's `norm`.

    Raises:
        WeightsError: weights with both norms.
    """
    if {"norm.weight", "fc_norm.weight"} <= weights.keys():
        raise WeightsError("there are two final norms, norm and fc_norm, and a VisionTower has one")
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if _DROPPED.fullmatch(key):
            continue
        key = _RENAME.sub(lambda found: _RENAMED[found[1]], key)
        if key.startswith("fc_norm."):
            key = key.removeprefix("fc_")
        if key.endswith("attn.qkv.weight") and value.ndim == 2 and value.shape[0] % 3 == 0 < value.shape[0]:
            # fused, where attention has no inner norm
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace("qkv", f"{part}_proj")] = rows
        else:
            renamed[key] = value
    return renamed


def to_eva_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's state dict under EVA's names, which jina-clip has too."""
    return {_RENAME_BACK.sub(lambda found: _EVA_NAMES[found[1]], key): value for key, value in weights.items()}


def infer_config(
    raw: Mapping[str, Tensor], source: str, *, resolution: Resolution | None = None, **stated: Any
) -> VisionTowerConfig:
    """The shape of weights from `read_image_half`.

    Args:
        raw: the weights.
        source: where they are from, for messages.
        resolution: the input's size, used if the position table has its grid; otherwise a square is inferred.
        stated: settings that the caller knows. By default heads have 64 channels, as in all of EVA's B and L, and
            rotary positions are rescaled to 16, unless the file has EVA's own rotary table and that says otherwise.

    Raises:
        WeightsError: weights of another kind of tower.
    """
    weights = to_timm_names(raw)
    try:
        width, _, _, patch = weights[_PATCH].shape
        _, places, _ = weights["pos_embed"].shape
        _, hidden = weights["blocks.0.mlp.fc2.weight"].shape
        layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        places -= 1
        if min(width, patch, places, hidden) < 1:
            raise ValueError("a dimension of 0")
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{source} is no EVA02 tower: {error} is missing or of another shape") from error
    try:
        stated_fits = resolution is not None and math.prod(grid_of(resolution, patch)) == places
    except ValueError as error:
        raise WeightsError(f"{source} does not fit the size of images that is stated: {error}") from error
    if not stated_fits:
        side = math.isqrt(places)
        if side * side != places:
            raise WeightsError(
                f"{source} has positions for {places} patches of {patch}, which is no square; state the resolution "
                "that it was trained at, as resolution=(height, width)"
            )
        resolution = side * patch
    found: dict[str, Any] = {
        "resolution": resolution,
        "width": width,
        "patch": patch,
        "layers": layers,
        "heads": max(1, width // 64),
        "mlp_width": hidden,
        "attention_norm": "blocks.0.attn.norm.weight" in weights,
        **_rotary_of(raw, width, source, stated),
        **stated,
    }
    try:
        return VisionTowerConfig.from_dict(found)
    except ValueError as error:
        raise WeightsError(f"{source} does not give the shape of a tower: {error}") from error


def _rotary_of(raw: Mapping[str, Tensor], width: int, source: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and reference grid from EVA's table of cosines `[n * n, head_dim]`, if the file has one: the reference with
    the nearest first row. The second half of a row turns with the column, each frequency twice."""
    table = raw.get("rope.freqs_cos")
    if table is None or table.ndim != 2 or len(table) < 4 or table.shape[1] < 4:
        return {}
    n, head_dim = math.isqrt(len(table)), table.shape[1]
    heads = {"heads": width // head_dim}
    if "reference_grid" in stated:
        return heads
    theta = stated.get("rope_theta", VisionTowerConfig.rope_theta)
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    references = torch.arange(1, 257, **like)
    frequencies = theta ** (-torch.arange(0, head_dim, 4, **like) / head_dim)
    columns = torch.arange(n, **like)[:, None] * frequencies / n
    expected = (references[:, None, None] * columns).cos()
    errors = (expected - table[:n, head_dim // 2 :: 2].float()).abs().amax(dim=(1, 2))
    if not errors.min() <= 0.05:  # a table in 16 bits is within 0.01
        raise WeightsError(
            f"{source} has a rotary table that is no grid rescaled to 1 … {len(references)} with theta {theta:g}; "
            "state rope_theta and reference_grid as it was trained"
        )
    return {**heads, "reference_grid": int(references[errors.argmin()])}
