"""What a recipe cannot mean: every rule that its types do not state, checked when it is read."""

from __future__ import annotations

from pathlib import Path

from stage_trainer.errors import UserError
from stage_trainer.recipe.schema import GradientCache, Model, Recipe


def check(recipe: Recipe, path: str | Path) -> None:
    """What types cannot say."""
    if recipe.log_every < 1 or recipe.checkpoint.keep < 1:
        raise UserError(f"{path}: 'log_every' and 'checkpoint.keep' should be at least 1")
    remote = recipe.remote
    limit = 1 if remote.gigabytes is None else remote.gigabytes
    if remote.downloads < 1 or remote.retries < 0 or remote.timeout <= 0 or limit <= 0:
        raise UserError(
            f"{path}: 'remote.downloads' should be at least 1, 'retries' at least 0, 'timeout' and 'gigabytes' above 0"
        )
    _check_model(recipe.model, path)
    if not recipe.stages:
        raise UserError(f"{path}: 'stages' is empty; a recipe needs at least one stage")
    for number, stage in enumerate(recipe.stages, 1):
        here = f"{path}: stage {number}"
        if stage.masked:
            _check_masked_lm(recipe, number, here)
        else:
            _check_pairs(recipe, number, here)
        cache = stage.gradient_cache
        if cache == "auto" and stage.masked:
            raise UserError(
                f"{here}: 'gradient_cache: auto' is for stages of pairs; masked-language-model training is told the "
                "tokens of one pass, such as {tokens: 16384}, or nothing"
            )
        if isinstance(cache, GradientCache) and (
            cache.images < 0 or cache.tokens < 0 or not cache.images + cache.tokens
        ):
            raise UserError(
                f"{here}: 'gradient_cache' should give the images and the tokens of one forward pass, such as "
                "{images: 256, tokens: 16384} (0: all of them), or be 'auto'; leave it out for none"
            )
        if stage.carry_optimizer and (number == 1 or recipe.stage(number - 1).masked != stage.masked):
            raise UserError(
                f"{here}: 'carry_optimizer' goes on with the moments of a stage of the same kind before, and there is "
                "none; leave it out"
            )
        if stage.steps < 1 or min(stage.batch.image_text, stage.batch.text, stage.batch.masked_lm) < 0:
            raise UserError(f"{here}: 'steps' should be at least 1 and batch sizes at least 0")
        for task in ("image_text", "text", "masked_lm"):
            if (size := getattr(stage.batch, task)) and not getattr(stage.data, task):
                raise UserError(
                    f"{here}: batch.{task} is {size} but data.{task} names no data; add sources or set it to 0"
                )
        for option in ("bf16", "fp16"):
            if stage.deepspeed.get(option) not in (None, {"enabled": False}):
                raise UserError(
                    f"{here}: deepspeed.{option} would round the temperatures too; set 'precision: bf16' instead, "
                    "which computes in bfloat16 and keeps parameters in float32"
                )
        partition = stage.deepspeed.get("zero_optimization", {})
        if not isinstance(partition, dict):
            raise UserError(f"{here}: deepspeed.zero_optimization should be a mapping such as {{stage: 1}}")
        zero = partition.get("stage", 0)
        if recipe.optimizer.name == "muon" and zero:
            raise UserError(
                f"{here}: Muon needs whole matrices, and ZeRO {zero} cuts them up; "
                "set zero_optimization.stage to 0 or optimizer.name to adamw"
            )


def _check_pairs(recipe: Recipe, number: int, here: str) -> None:
    """A stage that learns from pairs."""
    stage = recipe.stage(number)
    if recipe.model.vision is None and not (recipe.model.weights or recipe.model.vision_weights):
        raise UserError(
            f"{here} trains both towers, and 'model.vision' is missing; add it, or weights that have it "
            "(model.weights, model.vision_weights)"
        )
    for name in ("resolution", "patch_dropout"):
        starts = [start for start, _ in getattr(stage, name)]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(
                f"{here}: {name!r} should be [[0, …], [later step, …], …] with rising steps; found {starts}"
            )
    if not all(0 <= rate < 1 for _, rate in stage.patch_dropout):
        raise UserError(f"{here}: 'patch_dropout' rates should be at least 0 and below 1; found {stage.patch_dropout}")
    for task in ("image_text", "text"):
        if any(source.rate <= 0 for source in getattr(stage.data, task)):
            raise UserError(f"{here}: every rate of data.{task} should be above 0; leave out what is not wanted")
    if not stage.batch.image_text and not stage.batch.text:
        raise UserError(f"{here}: all batch sizes are 0; nothing would be trained")
    if stage.loss.kind == "unified" and not (stage.batch.image_text and stage.batch.text):
        raise UserError(f"{here}: a unified loss is over both tasks; give 'batch' an image_text and a text size")


def _check_masked_lm(recipe: Recipe, number: int, here: str) -> None:
    """A stage of masked-language-model training."""
    stage = recipe.stage(number)
    for task in ("image_text", "text"):
        if getattr(stage.batch, task):
            raise UserError(
                f"{here}: batch.masked_lm and batch.{task} are both set; masked-language-model training is a stage of "
                f"its own, so set batch.{task} to 0 or move one of them to another stage"
            )
    if number > 1 and not recipe.stage(number - 1).masked:
        raise UserError(
            f"{here}: masked-language-model training follows a stage that trains embeddings, whose image tower and "
            "adapters it would lose; put it first"
        )
    if stage.trainable.text != "all":
        raise UserError(
            f"{here}: trainable.text is {stage.trainable.text!r}; masked-language-model training is for all weights of "
            "the text tower, so leave it out"
        )
    if not 0 < stage.masking.share < 1 or not 0 <= stage.masking.language_exponent <= 1:
        raise UserError(
            f"{here}: masking.share should lie between 0 and 1 and masking.language_exponent from 0 (each language as "
            f"often as another) to 1 (by their texts); found {stage.masking.share} and "
            f"{stage.masking.language_exponent}"
        )


def _check_model(model: Model, path: str | Path) -> None:
    """Where the model is from."""
    text, vision = model.text_weights or model.weights, model.vision_weights or model.weights
    if model.tokenizer is None and not text:
        raise UserError(f"{path}: 'model.tokenizer' is missing; add it, or weights that have one")
    for key, weights in (("text", text), ("vision", vision), ("temperature", text and vision)):
        if getattr(model.override, key) and not weights:
            raise UserError(
                f"{path}: 'model.override.{key}' is set, and there are no weights to override; use 'model.{key}'"
            )
    for key, value in (("temperature", model.temperature), ("override.temperature", model.override.temperature)):
        if value is not None and not value > 0:
            raise UserError(f"{path}: 'model.{key}' is {value}; it should be above 0")
