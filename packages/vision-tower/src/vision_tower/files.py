"""Reading and writing towers: our directory, which timm reads too, and timm's own models."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import VisionTowerConfig
from .errors import WeightsError

if TYPE_CHECKING:
    from .tower import VisionTower

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MODEL_TYPE = "trilith_vision_tower"


def save(tower: VisionTower, path: str | PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors` (timm's names, the parameters' dtype) into the directory `path`.

    Both files are complete on disk in a temporary directory beside `path` before anything there changes: a full disk or
    a killed process leaves what was there. Other files in `path` stay. `timm.create_model(
    "eva02_large_patch14_clip_224", checkpoint_path=…/model.safetensors, **tower.config.timm_arguments())` loads it with
    the same output.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; save_pretrained needs a directory, new or existing")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}
        save_file(weights, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        config = {"model_type": MODEL_TYPE, **asdict(tower.config)}
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with (staging / name).open("rb+") as file:
                os.fsync(file.fileno())
        if target.exists():
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (staging / name).replace(target / name)
        else:
            staging.chmod(0o777 & ~_umask())  # mkdtemp's is for the owner alone
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | PathLike[str], *, checkpointing: bool | None = None) -> VisionTower:
    """A tower on the CPU, in float32, from a directory that `save` wrote; `checkpointing` overrides the stored setting.

    Raises FileNotFoundError for a missing file, ValueError for a configuration that is not ours and WeightsError for
    weights that do not fit it.
    """
    directory = Path(path)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name}; expected a directory written by VisionTower.save_pretrained "
                f"(for a timm model use VisionTower.from_timm)"
            )
    source = directory / CONFIG_NAME
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); restore it or save the tower again") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{source} does not describe a vision tower; expected model_type {MODEL_TYPE!r}")
    try:
        config = VisionTowerConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if checkpointing is not None:
        config = replace(config, checkpointing=checkpointing)
    try:
        weights = load_file(directory / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{directory / WEIGHTS_NAME} cannot be read as safetensors ({error}); copy or download it again"
        ) from error
    return _with_weights(config, weights, str(directory / WEIGHTS_NAME))


def from_timm(name: str, **options: Any) -> VisionTower:
    """A tower with the shape and weights of `timm.create_model(name, num_classes=0, **options)`, in float32 on the CPU.

    `pretrained=True` downloads timm's weights; `img_size` then changes the resolution after loading, with EVA's
    resampling rather than timm's. EVA02 models of B and L size, of CLIP and of MIM training: a MIM model, which
    averages patches, gives its final norm to our class token. Raises ValueError for anything else.
    """
    import timm

    resolution = options.pop("img_size", None) if options.get("pretrained") else None
    try:
        model = timm.create_model(name, **{"num_classes": 0, **options})
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        raise ValueError(f"timm knows no model {name!r}; timm.list_models('eva02*') lists those that fit") from error
    config = _config_of(model, name)
    weights = {key.replace("fc_norm.", "norm."): tensor for key, tensor in model.state_dict().items()}
    tower = _with_weights(config, weights, f"timm's {name}")
    return tower if resolution is None else tower.set_resolution(resolution)


def _config_of(model: Any, name: str) -> VisionTowerConfig:
    from timm.layers import SwiGLU
    from timm.models.eva import Eva, EvaBlock

    block: Any = model.blocks[0] if isinstance(model, Eva) else None
    is_eva02 = (
        isinstance(block, EvaBlock)
        and isinstance(block.mlp, SwiGLU)
        and getattr(block.attn, "q_proj", None) is not None
        and getattr(model.rope, "ref_feat_shape", None) is not None
    )
    if not is_eva02:
        raise ValueError(
            f"timm's {name} is no EVA02 model with separate q, k, v and a normed SwiGLU; use one of "
            "eva02_base_patch16_clip_224, eva02_large_patch14_clip_224, eva02_large_patch14_clip_336, "
            "eva02_base_patch14_*, eva02_large_patch14_*"
        )
    rows, columns = model.rope.ref_feat_shape
    if rows != columns or model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        raise ValueError(f"timm's {name} has a non-square patch or reference grid; a VisionTower's are square")
    height, width = model.patch_embed.img_size
    return VisionTowerConfig(
        resolution=height if height == width else (height, width),
        patch=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc2.in_features,
        reference_grid=rows,
        rope_theta=float(model.rope.temperature),
        attention_norm=not isinstance(block.attn.norm, torch.nn.Identity),
        layer_norm_eps=block.norm1.eps,
    )


def _with_weights(config: VisionTowerConfig, weights: Mapping[str, Tensor], source: str) -> VisionTower:
    """Builds the tower around the weights, so that they are neither initialised first nor held twice."""
    from .tower import VisionTower

    with torch.device("meta"):
        tower = VisionTower(config)
    expected = tower.state_dict()
    problems = [
        (f"{kind}: {', '.join(sorted(keys)[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""))
        for kind, keys in (
            ("missing", expected.keys() - weights.keys()),
            ("not known", weights.keys() - expected.keys()),
            (
                "of another shape",
                {
                    f"{key} {list(weights[key].shape)} where {list(expected[key].shape)} is needed"
                    for key in expected.keys() & weights.keys()
                    if weights[key].shape != expected[key].shape
                },
            ),
        )
        if keys
    ]
    if problems:
        height, width = config.grid
        raise WeightsError(
            f"{source} does not fit a tower of width {config.width}, {config.layers} layers, patch {config.patch} and "
            f"a {height}x{width} grid. {'; '.join(problems)}. Use the config.json that was written with these weights"
        )
    tower.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=True)
    return tower
