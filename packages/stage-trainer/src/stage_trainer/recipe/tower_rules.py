"""Rules for the towers: their configurations, and what stages require of them.

If the recipe names weights, these determine what it does not state, so only what it states is checked.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from text_tower.config import TextTowerConfig
from vision_tower.config import VisionTowerConfig

from stage_trainer.errors import UserError
from stage_trainer.recipe.schema import Recipe, Stage


def check_towers(recipe: Recipe, where: str) -> None:
    """UserError if the recipe violates a rule for the towers."""
    model, pairs = recipe.model, [stage for stage in recipe.stages if stage.kind.both_towers]
    weights = model.text_weights or model.weights
    text = _Stated(TextTowerConfig, model.text | model.override.text, weights, f"{where}: model.text")
    vision, weights = None, model.vision_weights or model.weights
    if model.vision is not None or weights:
        stated = (model.vision or {}) | model.override.vision
        if "resolution" in stated:
            raise UserError(f"{where}: model.vision.resolution is set by each stage's 'resolution'; take it out")
        vision = _Stated(VisionTowerConfig, stated, weights, f"{where}: model.vision")
    widths = [tower.output_width for tower in (text, vision) if tower]
    if pairs and None not in widths and len(set(widths)) > 1:
        raise UserError(
            f"{where}: texts have {widths[0]} numbers (model.text.width or its projector's) and images {widths[1]} "
            f"(model.vision.width or its projector's); they share one space, so set model.vision.projector to "
            f"{widths[0]}, or model.text.projector to {widths[1]}"
        )
    width = next((width for width in widths if width is not None), None)
    for number, stage in enumerate(recipe.stages, 1):
        _check_stage(stage, text, vision, width, f"{where}: stage {number}")


def _check_stage(stage: Stage, text: _Stated, vision: _Stated | None, width: int | None, here: str) -> None:
    """What a stage requires of the towers, whose embeddings have `width` numbers (None: the weights know)."""
    longest = text.value("max_length")
    if longest is not None and stage.max_tokens > longest:
        raise UserError(
            f"{here}: max_tokens is {stage.max_tokens}, more than the text tower takes (model.text.max_length "
            f"{longest}); lower the one or raise the other"
        )
    if stage.kind.rotary and (found := text.value("positions")) not in (None, "rotary"):
        raise UserError(f"{here}: model.text.positions is {found!r}; {stage.kind.title} is for rotary towers")
    if not stage.kind.both_towers:
        return
    if width is not None and max(stage.loss.dims) > width:
        raise UserError(f"{here}: loss.dims is {list(stage.loss.dims)}; expected prefixes of 1 to {width}")
    if stage.trainable.text == "adapters" and text.value("adapters") == ():
        raise UserError(f"{here}: trainable.text is 'adapters', but model.text.adapters names none; add one")
    if stage.trainable.image == "adapters" and vision and vision.value("lora_rank") == 0:
        raise UserError(f"{here}: trainable.image is 'adapters', but model.vision.lora_rank is 0; raise it")
    for name, key, tower, other in (("image", "vision", vision, "text"), ("text", "text", text, "image")):
        if getattr(stage.trainable, name) == "projector" and tower and tower.value("projector") == 0:
            raise UserError(
                f"{here}: trainable.{name} is 'projector', but model.{key}.projector is 0; set it to the {other} "
                "tower's width"
            )
    if "text" in stage.stored and text.value("dropout"):
        raise UserError(
            f"{here}: 'embedding_cache' keeps the embeddings of texts that never change, and model.text.dropout is "
            f"{text.value('dropout'):g}; set it to 0"
        )
    patch = vision.value("patch") if vision else None
    for start, resolution in stage.resolution:
        if resolution < (patch or 1):
            raise UserError(
                f"{here}: the resolution from step {start} on is {resolution} pixels, below one patch of the image "
                f"tower (model.vision.patch, {patch or 'unknown'}); raise it"
            )


class _Stated:
    """A tower's configuration as far as the recipe states it."""

    def __init__(self, cls: type, values: dict[str, object], weights: str | None, where: str):
        self.stated, self.weights = set(values), weights
        self.config = build_config(cls, _completed(cls, values) if weights else values, where)

    @property
    def output_width(self) -> Any:
        """Numbers of an embedding; None if the weights determine it."""
        return self.value("projector") or self.value("width")

    def value(self, name: str) -> Any:
        """None if the weights determine it."""
        return None if self.weights and name not in self.stated else getattr(self.config, name)


def _completed(cls: type, values: dict[str, object]) -> dict[str, object]:
    """`values` with placeholders for the weights' values of settings that a configuration checks against others."""
    missing: dict[str, object] = {}
    if "width" in values:
        missing["heads"] = 1
    elif isinstance(heads := values.get("heads"), int):
        missing["width"] = 64 * heads
    if values.get("adapters"):
        missing["lora_rank"] = 1
    elif values.get("lora_rank") and "adapters" in fields_of(cls):
        missing["adapters"] = ("the weights' own",)
    return {**missing, **values}


def build_config(cls: type, values: dict[str, object], where: str) -> Any:
    """A tower's frozen config dataclass from a recipe's mapping; UserError if it is invalid."""
    known = fields_of(cls)
    if unknown := sorted(str(key) for key in set(values) - set(known)):
        raise UserError("; ".join(unknown_key(f"{where}.{key}", key, known) for key in unknown))
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from error


def fields_of(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def unknown_key(path: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {path!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
