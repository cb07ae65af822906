"""Weights to start from: where they are, which configuration they bring, and what a recipe may still decide.

What belongs to weights (shapes, rotary base, epsilons, adapters, instructions, temperatures) comes from them. A recipe
may leave it out or state the same; anything else it must state under `model.override`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stage_trainer import hub
from stage_trainer.dual_encoder import FORMAT, read_config
from stage_trainer.errors import UserError
from stage_trainer.formats import jina_clip_read, open_clip_read, parts
from stage_trainer.recipe import ModelConfig
from stage_trainer.recipe.schema import NEW_TEMPERATURE
from stage_trainer.recipe.tower_rules import build_config

RECIPES_OWN = {
    "text": ("dropout", "checkpointing", "attention", "compile", "residual_in_fp32", "max_length"),
    "vision": ("checkpointing", "attention", "compile", "residual_in_fp32", "resolution"),
}
"""What the recipe decides about a tower, not its weights."""
_FROM_WEIGHTS_BY_DEFAULT = ("max_length", "resolution")  # those of them that a recipe may leave to the weights
_FIXED = ("vocab_size", "width", "layers", "heads", "mlp_width", "patch", "mlp_ratio", "attention_norm", "positions",
          "mlp", "token_types", "projector", "projector_hidden")  # fmt: skip
_ADAPTERS = ("adapters", "lora_rank", "lora_alpha")  # weights without any leave them to the recipe
_PROJECTOR = ("projector", "projector_hidden")  # likewise


def tower_weights(model: ModelConfig, tower: str, fetch: bool) -> str | None:
    """Where a tower's weights are: a directory, a file, or a timm name. None if the recipe names none, or if they would
    have to be downloaded and `fetch` is false."""
    named = model.text_weights if tower == "text" else model.vision_weights
    weights = named or model.weights
    if weights is None or not (fetch or Path(weights).exists() or _is_timms(weights)):
        return None
    if named:
        return named if tower == "vision" else str(hub.local(named))
    whole = hub.local(weights)
    return str(whole / tower if _is_ours(whole) else whole)


def absent(model: ModelConfig) -> list[str]:
    """Weights that the recipe names but this machine does not have; sizes then come from the recipe and defaults."""
    named = [model.text_weights or model.weights, model.vision_weights or model.weights]
    return list(dict.fromkeys(w for w in named if w and not Path(w).exists() and not _is_timms(w)))


def _is_timms(weights: str) -> bool:
    """Whether it is a timm name, whose tower's shape is known without its weights."""
    return weights.startswith("timm/")


def given(path: str, tower: str) -> tuple[Any, frozenset[str]]:
    """(the configuration that a tower's weights bring, the fields that they leave to the recipe); for an image tower
    `path` may be a timm name."""
    if tower == "text":
        from text_tower.pretrained import read_config

        return read_config(path)
    there = Path(path)
    files = list(there.iterdir()) if there.is_dir() else [there] if there.exists() else []
    return _given_vision(path, tuple(sorted((file.name, file.stat().st_mtime_ns) for file in files))), frozenset()


@functools.cache  # since it reads the weights; `files` tells the cache when one changes
def _given_vision(path: str, files: tuple[tuple[str, int], ...]) -> Any:
    from vision_tower import VisionTower

    if files:
        return VisionTower.from_pretrained(path, num_classes=0).config
    with torch.device("meta"):
        return VisionTower.from_timm(path.removeprefix("timm/"), pretrained=False).config


def decided(model: ModelConfig, tower: str, given: Any, unsettled: frozenset[str], holder: str) -> Any:
    """A tower's configuration, from that of its weights and the recipe.

    Args:
        given: the weights' configuration.
        unsettled: fields that these weights leave to the recipe.
        holder: where `given` is from, for messages: "the weights in … say".

    Raises:
        UserError: the recipe contradicts the weights without overriding them.
    """
    stated: Mapping[str, Any] = getattr(model, tower) or {}
    override: Mapping[str, object] = getattr(model.override, tower)
    own = {*RECIPES_OWN[tower], *unsettled}
    for name in set(override) & set(_FIXED):
        raise UserError(
            f"model.override.{tower}.{name} is {_plain(override[name])}, but {holder} {_plain(_held(name, given))}; a "
            "shape cannot be overridden: leave it out, or name other weights"
        )
    own |= {*_ADAPTERS} if not given.lora_rank else set()
    own |= {*_PROJECTOR} if not given.projector else set()
    if tower == "text":
        chosen = tuple(stated.get("adapters") or ())
        if chosen and set(chosen) <= set(given.adapters):  # a subset contradicts nothing
            own |= {"adapters"}
            left_out = set(given.adapters) - set(chosen)
            kept = {task: text for task, text in given.instructions.items() if task not in left_out}
            given = dataclasses.replace(given, instructions=kept)
        own |= {name for name in ("instructions", "truncate_dim") if not getattr(given, name)}
    silent = {f.name: f.default for f in dataclasses.fields(given) if f.name in RECIPES_OWN[tower]}
    values = dataclasses.asdict(given) | {k: v for k, v in silent.items() if k not in _FROM_WEIGHTS_BY_DEFAULT}
    for name, value in stated.items():
        if name in own or not hasattr(given, name):  # unknown names are refused below, with the nearest right one
            values[name] = value
        elif name not in override and (says := _says(name, value, given)) != (held := _held(name, given)):
            way = f"state it under model.override.{tower} to use another value" if name not in _FIXED else "name others"
            raise UserError(
                f"model.{tower}.{name} is {_plain(says)}, but {holder} {_plain(held)}; it belongs to the weights: "
                f"leave it out, or {way}"
            )
    if "adapters" in override and not override["adapters"]:
        values["lora_rank"] = 0
    return build_config(type(given), {**values, **override}, f"model.{tower}")


def _says(name: str, value: object, given: Any) -> object:
    """What a recipe states, for comparison with `_held`."""
    if name == "mlp_ratio" and isinstance(value, int | float):  # a ratio states a width
        return int(given.width * value)
    return tuple(value) if isinstance(value, list) else value


def _held(name: str, given: Any) -> object:
    return given.mlp_width if name == "mlp_ratio" else getattr(given, name)


def reading_options(config: Any, given: Any) -> dict[str, Any]:
    """Options of `from_pretrained` with which a tower gets the configuration `config`."""
    names = [f.name for f in dataclasses.fields(config)]
    changed = {name for name in names if getattr(config, name) != getattr(given, name)} - {"resolution"}
    return {name: getattr(config, name) for name in names if name in changed}


def whole_model(model: ModelConfig) -> Path | None:
    """The directory of the model that both towers are from, if they are from the same."""
    if model.text_weights and model.text_weights == model.vision_weights:
        return hub.local(model.text_weights)
    if model.text_weights or model.vision_weights:
        folders = [Path(weights) for weights in (model.text_weights, model.vision_weights) if weights]
        if len(folders) < 2 or not all(folder.exists() for folder in folders):
            return None
        text, vision = folders
        return text.parent if text.parent == vision.parent and _is_ours(text.parent) else None
    return hub.local(model.weights) if model.weights else None


def log_scales(model: ModelConfig) -> tuple[float, float]:
    """The initial ln(1 / temperature) of the image-text task and of the text task.

    Those of the whole model that both towers are from, if there is one; jina-clip-v2 has only one, which is used twice.

    Raises:
        UserError: the recipe contradicts the weights' temperature without overriding it.
    """
    whole = whole_model(model)
    held = _held_scales(whole) if whole else None
    if model.override.temperature is not None or held is None:
        scale = -math.log(model.override.temperature or model.temperature or NEW_TEMPERATURE)
        return scale, scale
    temperature = math.exp(-held[0])
    if model.temperature is not None and not math.isclose(model.temperature, temperature, rel_tol=1e-3):
        raise UserError(
            f"model.temperature is {model.temperature:g}, but {whole} has {temperature:g} (logit_scale {held[0]:g}); "
            "leave it out, since it belongs to the weights, or set model.override.temperature to start elsewhere"
        )
    return held


def biases(model: ModelConfig) -> tuple[float, float] | None:
    """A sigmoid loss's biases of the image-text and the text task, of the whole model that both towers are from."""
    whole = whole_model(model)
    if whole is None:
        return None
    if _is_ours(whole):
        return read_config(whole).biases
    if open_clip_read.is_one(whole):
        return open_clip_read.held_biases(whole)
    return parts.stated_biases(whole) if jina_clip_read.is_one(whole) else None


def _held_scales(whole: Path) -> tuple[float, float] | None:
    if _is_ours(whole):
        config = read_config(whole)
        return config.logit_scale, config.text_logit_scale
    if open_clip_read.is_one(whole):
        return open_clip_read.held_scales(whole)
    scale = parts.scalar(whole)
    if scale is None:
        return None
    number = parts.as_scale(scale, whole)
    return number, parts.stated_text_scale(whole, number) if jina_clip_read.is_one(whole) else number


def _is_ours(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes().decode()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, tuple) else repr(value) if isinstance(value, str) else str(value)
