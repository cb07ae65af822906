"""Models from a recipe: the towers from their configurations, with weights to start from where it names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from text_tower import TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

from stage_trainer import weights
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.recipe import LossConfig, ModelConfig, Recipe, Stage
from stage_trainer.recipe.address import is_remote
from stage_trainer.recipe.tower_rules import build_config, check_towers

_TowerConfig = TextTowerConfig | VisionTowerConfig
_ABSENT_RANK = 4
"""Taken for that of adapters whose weights are not here: jina-embeddings-v3's."""


def check_configs(recipe: Recipe, number: int, fetch: bool = False) -> None:
    """`Task.check_configs` of a stage of two towers."""
    check_settled(recipe, recipe.stages, *tower_configs(recipe, number, fetch), fetch)


def check_settled(
    recipe: Recipe, stages: Sequence[Stage], text: TextTowerConfig, vision: VisionTowerConfig | None, fetch: bool
) -> None:
    """Checks stages against the towers as their weights and the recipe have them."""
    shown = None
    if vision is not None:
        shown = {name: value for name, value in dataclasses.asdict(vision).items() if name != "resolution"}
    settled = ModelConfig(text=dataclasses.asdict(text), tokenizer=recipe.model.tokenizer, vision=shown)
    if fetch or not weights.absent(recipe.model):
        check_towers(dataclasses.replace(recipe, model=settled, stages=tuple(stages)), recipe.name)


def tower_configs(recipe: Recipe, number: int, fetch: bool = False) -> tuple[TextTowerConfig, VisionTowerConfig]:
    """The towers' configurations at the start of a stage that trains both.

    Weights that the recipe starts from say what belongs to them (see `stage_trainer.weights`). Where they are not on
    this machine, and `fetch` does not bring them, the recipe and the towers' defaults stand for them.
    """
    text = tower_config(recipe.model, "text", fetch)
    vision = tower_config(recipe.model, "vision", fetch, resolution=recipe.stage(number).resolution[0][1])
    return text, vision


def tower_config(model: ModelConfig, tower: str, fetch: bool, **more: Any) -> Any:
    """The configuration of a tower ("text", "vision") by its weights and the recipe; `more` overrules the recipe."""
    of_tower: dict[str, Any] = {tower: {**(getattr(model, tower) or {}), **more}}
    model = dataclasses.replace(model, **of_tower)
    with named_weights(model, tower):
        path = weights.tower_weights(model, tower, fetch)
        if path is None:
            cls = TextTowerConfig if tower == "text" else VisionTowerConfig
            values = getattr(model, tower) | getattr(model.override, tower)
            named = getattr(model, f"{tower}_weights") or model.weights
            if named and values.get("adapters") and "lora_rank" not in values:
                values["lora_rank"] = _ABSENT_RANK
            return build_config(cls, values, f"model.{tower}")
        return weights.decided(model, tower, *weights.given(path, tower), f"the weights in {path} say")


@contextmanager
def named_weights(model: ModelConfig, tower: str) -> Iterator[None]:
    """Errors of the towers and of the hub, in their own words on what is missing or damaged, under the key's name."""
    key = f"{tower}_weights" if getattr(model, f"{tower}_weights") else "weights"
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"model.{key}: {error}") from error


def build_model(recipe: Recipe, number: int, tokenizer: Tokenizer | None = None) -> DualEncoder:
    """`Task.build_model` of the first stage that trains two towers."""
    text_config, vision_config = tower_configs(recipe, number, fetch=True)
    with named_weights(recipe.model, "text"):
        path = weights.tower_weights(recipe.model, "text", fetch=True)
        if path:
            _check_projector("text", recipe.stages[number - 1 :], weights.given(path, "text")[0], text_config)
        text = _read_text(path, text_config) if path else TextTower(text_config)
    with named_weights(recipe.model, "vision"):
        path = weights.tower_weights(recipe.model, "vision", fetch=True)
        if path:
            _check_projector("vision", recipe.stages[number - 1 :], weights.given(path, "vision")[0], vision_config)
        vision = _read_vision(path, vision_config) if path else VisionTower(vision_config)
    model = DualEncoder(text, vision)
    model.set_biases(weights.biases(recipe.model))
    _prepare_for_loss(model, recipe.stage(number).loss)
    with torch.no_grad():
        for parameter, scale in zip(
            (model.logit_scale, model.text_logit_scale), weights.log_scales(recipe.model), strict=True
        ):
            parameter.fill_(scale)
    with_tokenizer(text, tokenizer, recipe.model)
    return model


def with_tokenizer(tower: TextTower, tokenizer: Tokenizer | None, model: ModelConfig) -> None:
    """Gives a new text tower its tokenizer, if there is one.

    Raises:
        UserError: it is of another vocabulary.
    """
    if tokenizer is None:
        return
    if not tokenizer.fits(tower.config.vocab_size):
        hint = f"set model.text.vocab_size={tokenizer.vocab_size}"
        if model.text_weights or model.weights:
            hint = "take the tokenizer that the weights were trained with"
        raise UserError(
            f"the tokenizer {model.tokenizer or 'of the weights'} has {tokenizer.vocab_size} tokens, "
            f"model.text.vocab_size is {tower.config.vocab_size}; {hint}"
        )
    tower.tokenizer = tokenizer


def _check_projector(tower: str, stages: Sequence[Stage], given: _TowerConfig, config: _TowerConfig) -> None:
    """UserError for a new projector that nothing trains while a loss reads what it gives."""
    name, parts = ("text", ("captions", "texts")) if tower == "text" else ("image", ("images",))
    first = next((stage for stage in stages if any(map(stage.reads, parts))), None)
    if config.projector and not given.projector and first and getattr(first.trainable, name) == "none":
        raise UserError(
            f"the weights have no projector, so model.{tower}.projector makes a new one, of random numbers, and "
            f"trainable.{name} is 'none': set it to 'projector'"
        )


def _read_text(path: str, config: TextTowerConfig) -> TextTower:
    """Adapters that the weights lack are made new."""
    return TextTower.from_pretrained(path, **weights.reading_options(config, weights.given(path, "text")[0]))


def _read_vision(path: str, config: VisionTowerConfig) -> VisionTower:
    """From a directory or a file, or timm's weights of that name (`timm/eva02_…`). Adapters that they lack are new."""
    options = weights.reading_options(config, weights.given(path, "vision")[0])
    if Path(path).exists():
        return VisionTower.from_pretrained(path, **{"num_classes": 0, **options})  # without a head, if they have one
    published = VisionTower.from_timm(path.removeprefix("timm/"), pretrained=True)
    tower = VisionTower(dataclasses.replace(published.config, **options))
    tower.load_state_dict(tower.state_dict() | published.state_dict())  # its adapters, if it has any, stay new
    return tower


def load_model(recipe: Recipe, number: int, path: Path) -> DualEncoder:
    """`Task.load_model` of a stage of two towers."""
    options = {}
    for tower in ("text", "vision"):
        try:
            given, unsettled = weights.given(str(path / tower), tower)
        except (ValueError, OSError) as error:
            raise UserError(f"cannot load {path}: {error}") from error
        config = weights.decided(recipe.model, tower, given, unsettled, f"{path} holds")
        options[tower] = weights.reading_options(config, given)
    model = DualEncoder.from_pretrained(path, **options)
    _prepare_for_loss(model, recipe.stage(number).loss)
    return model


def _prepare_for_loss(model: DualEncoder, loss: LossConfig) -> None:
    """Gives the model what the loss trains beside the towers, and takes away what it does not."""
    model.matryoshka_dims = loss.dims
    if loss.kind != "sigmoid":
        model.set_biases(None)
    elif model.logit_bias is None:
        model.set_biases((loss.bias, loss.bias))


def empty_model(recipe: Recipe, number: int) -> DualEncoder:
    """A stage's model of two towers at its last resolution, on the meta device: shapes without memory."""
    text_config, vision_config = tower_configs(recipe, number)
    with torch.device("meta"):
        model = DualEncoder(TextTower(text_config), VisionTower(vision_config))
        _prepare_for_loss(model, recipe.stage(number).loss)
        model.vision.set_resolution(recipe.stage(number).resolution[-1][1])
    return model


def load_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, or that of the weights that it starts from."""
    path = recipe.model.tokenizer
    if path is None:
        with named_weights(recipe.model, "text"):
            path = weights.tower_weights(recipe.model, "text", fetch=True)
        if path is None or (tokenizer := Tokenizer.in_directory(path)) is None:
            raise UserError(f"model.tokenizer is left out, and the weights in {path} have no tokenizer; name one")
        return tokenizer
    try:
        return Tokenizer.from_file(path)
    except FileNotFoundError as error:
        hint = "" if is_remote(recipe.corpus) else f"; for the laptop corpus run `data-prep corpus {recipe.corpus}`"
        raise UserError(f"no tokenizer at {path} (model.tokenizer){hint}") from error
