"""A stage's model: the towers from their configurations, with weights to start from where the recipe names them.

A stage of masked-language-model training has the text tower with a head for its model, any other one both towers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from text_tower import MaskedLM, TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

from stage_trainer.data.remote import is_remote
from stage_trainer.errors import UserError
from stage_trainer.model import DualEncoder
from stage_trainer.recipe import Recipe
from stage_trainer.recipe.tower_rules import build_config

Model = DualEncoder | MaskedLM


def masked_lm_config(recipe: Recipe) -> TextTowerConfig:
    """The text tower's configuration in a stage of masked-language-model training: adapters come later."""
    plain = {**recipe.model.text, "adapters": (), "lora_rank": 0}
    return build_config(TextTowerConfig, plain, "model.text")


def tower_configs(recipe: Recipe, number: int) -> tuple[TextTowerConfig, VisionTowerConfig]:
    """The towers' configurations at the start of a stage that trains both."""
    text = build_config(TextTowerConfig, recipe.model.text, "model.text")
    resolution = recipe.stage(number).resolution[0][1]
    vision = build_config(VisionTowerConfig, {**(recipe.model.vision or {}), "resolution": resolution}, "model.vision")
    return text, vision


def build_model(recipe: Recipe, number: int, tokenizer: Tokenizer | None = None) -> Model:
    """A new model for the first stage that trains.

    Raises:
        UserError: a configuration that does not hold, a tokenizer of another vocabulary, weights that do not fit.
    """
    model = _build_masked_lm(recipe) if recipe.stage(number).masked else _build_dual_encoder(recipe, number)
    text = model.tower if isinstance(model, MaskedLM) else model.text
    if tokenizer is not None:
        if tokenizer.vocab_size != text.config.vocab_size:
            raise UserError(
                f"the tokenizer {recipe.model.tokenizer} has {tokenizer.vocab_size} tokens, model.text.vocab_size is "
                f"{text.config.vocab_size}; set model.text.vocab_size={tokenizer.vocab_size}"
            )
        text.tokenizer = tokenizer
    return model


def _build_masked_lm(recipe: Recipe) -> MaskedLM:
    weights = recipe.model.text_weights
    if not weights:
        return MaskedLM(TextTower(masked_lm_config(recipe)))
    return _read_masked_lm(recipe, weights, "model.text_weights", "the starting weights hold")


def _read_masked_lm(recipe: Recipe, weights: str, what: str, holder: str) -> MaskedLM:
    config = masked_lm_config(recipe)
    try:
        model = MaskedLM.from_pretrained(_local(weights), **_text_options(config))
    except (ValueError, OSError) as error:  # the tower's and the hub's own words on what is missing or damaged
        raise UserError(f"{what}: {error}") from error
    _check_shape("text", model.tower.config, config, holder)
    return model


def _build_dual_encoder(recipe: Recipe, number: int) -> DualEncoder:
    text_config, vision_config = tower_configs(recipe, number)
    text: TextTower | None = None
    vision: VisionTower | None = None
    try:
        if recipe.model.text_weights:
            text = _pretrained_text(recipe.model.text_weights, text_config)
        if recipe.model.vision_weights:
            vision = _pretrained_vision(recipe.model.vision_weights, vision_config)
    except (ValueError, OSError) as error:  # the towers' and the hub's own words on what is missing or damaged
        where = "text_weights" if text is None and recipe.model.text_weights else "vision_weights"
        raise UserError(f"model.{where}: {error}") from error
    text, vision = text or TextTower(text_config), vision or VisionTower(vision_config)
    model = DualEncoder(
        text, vision, temperature=recipe.model.temperature, matryoshka_dims=recipe.stage(number).loss.dims
    )
    _check_shape("text", text.config, text_config, "the starting weights hold")
    _check_shape("vision", vision.config, vision_config, "the starting weights hold")
    return model


def load_model(recipe: Recipe, number: int, path: Path) -> Model:
    """A checkpoint's model, with the recipe's settings that have no bearing on its weights (dropout, checkpointing, …).

    Raises:
        UserError: a directory that holds no model, or one of another shape than the recipe's.
    """
    if recipe.stage(number).masked:
        return _read_masked_lm(recipe, str(path), f"cannot load {path}", f"{path} holds")
    text_config, vision_config = tower_configs(recipe, number)
    options = {"text": _text_options(text_config), "vision": _vision_options(vision_config)}
    model = DualEncoder.from_pretrained(path, **options)
    _check_shape("text", model.text.config, text_config, f"{path} holds")
    _check_shape("vision", model.vision.config, vision_config, f"{path} holds")
    model.matryoshka_dims = recipe.stage(number).loss.dims
    return model


def with_text_weights(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with a directory for its `model.text_weights`."""
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, text_weights=str(path)))


def empty_model(recipe: Recipe, number: int) -> Model:
    """The model of a stage at its last resolution, on the meta device: every shape and no memory."""
    if recipe.stage(number).masked:
        with torch.device("meta"):
            return MaskedLM(TextTower(masked_lm_config(recipe)))
    text_config, vision_config = tower_configs(recipe, number)
    with torch.device("meta"):
        model = DualEncoder(TextTower(text_config), VisionTower(vision_config))
        model.vision.set_resolution(recipe.stage(number).resolution[-1][1])
    return model


def load_tokenizer(recipe: Recipe) -> Tokenizer:
    try:
        return Tokenizer.from_file(recipe.model.tokenizer)
    except FileNotFoundError as error:
        hint = "" if is_remote(recipe.corpus) else f"; for the laptop corpus run `data-prep corpus {recipe.corpus}`"
        raise UserError(f"no tokenizer at {recipe.model.tokenizer} (model.tokenizer){hint}") from error


def _pretrained_text(weights: str, config: TextTowerConfig) -> TextTower:
    """From a directory, or a repository of the Hugging Face hub; adapters that the weights lack are made new."""
    return TextTower.from_pretrained(_local(weights), **_text_options(config))


def _local(weights: str) -> str:
    """The directory itself, or that of a repository of the Hugging Face hub."""
    if Path(weights).is_dir():
        return weights
    from huggingface_hub import snapshot_download

    return snapshot_download(weights)


def _pretrained_vision(weights: str, config: VisionTowerConfig) -> VisionTower:
    """From a directory or a file, or timm's weights of that name (`timm/eva02_…`)."""
    options = _vision_options(config)
    if Path(weights).exists():
        return VisionTower.from_pretrained(weights, num_classes=0, **options)  # without a head, if they have one
    tower = VisionTower.from_timm(weights.removeprefix("timm/"), pretrained=True)
    tower.config = dataclasses.replace(tower.config, **options)
    return tower


def _text_options(config: TextTowerConfig) -> dict[str, Any]:
    """What a recipe decides about a text tower whose weights are given."""
    names = ["dropout", "checkpointing", "attention", "compile", "max_length", "rope_theta", "instructions"]
    if config.adapters:
        names += ["adapters", "lora_rank", "lora_alpha"]
    return {name: getattr(config, name) for name in names}


def _vision_options(config: VisionTowerConfig) -> dict[str, Any]:
    return {"checkpointing": config.checkpointing, "attention": config.attention}


def _check_shape(name: str, found: Any, wanted: Any, holder: str) -> None:
    """Weights must be of the recipe's shape; what has no bearing on shapes may differ."""
    for key in ("width", "layers", "heads", "patch", "vocab_size", "mlp_width", "mlp_hidden"):
        if (value := getattr(wanted, key, None)) != (held := getattr(found, key, None)):
            raise UserError(f"model.{name}.{key} is {value}, but {holder} {held}; make them agree")
