"""The rules for a recipe that its types do not state, checked when it is read, before torch is imported.

By subject: numbers and texts (`ranges`), the towers (`tower_rules`), a stage (`stage_rules`), DeepSpeed's options
(`deepspeed`), and here what concerns the recipe as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stage_trainer.errors import UserError
from stage_trainer.recipe import deepspeed
from stage_trainer.recipe.ranges import OF_RECIPE, OF_STAGE, check_leaves, check_ranges
from stage_trainer.recipe.schema import ModelConfig, Recipe, Stage
from stage_trainer.recipe.stage_rules import check_stage
from stage_trainer.recipe.tower_rules import check_towers


def check(recipe: Recipe, where: str, *, stage: int | None = None, ranks: int = 1) -> None:
    """Checks every rule.

    Args:
        where: the recipe's name in messages.
        stage: the stage that is to run, from 1; None: any may.
        ranks: processes that share a batch.

    Raises:
        UserError: the first violation: what was found, what was expected, what to do.
    """
    check_leaves(dataclasses.asdict(recipe), where)
    check_ranges(recipe, OF_RECIPE, where)
    _check_model(recipe.model, where)
    if not recipe.stages:
        raise UserError(f"{where}: 'stages' is empty; a recipe needs at least one stage")
    for number, of_number in enumerate(recipe.stages, 1):
        here = f"{where}: stage {number}"
        check_ranges(of_number, OF_STAGE, here)
        check_stage(recipe, number, here)
        deepspeed.check(of_number.deepspeed, here, muon=recipe.optimizer.name == "muon")
    check_towers(recipe, where)
    numbers = range(1, len(recipe.stages) + 1)
    if stage is not None:
        recipe.stage(stage)
        numbers = range(stage, stage + 1)
    _check_evaluation(recipe, numbers, where)
    for number in numbers:
        check_ranks(recipe.stage(number), ranks, f"{where}: stage {number}")


def check_ranks(stage: Stage, ranks: int, here: str) -> None:
    """UserError unless every rank gets at least one sample of each task."""
    for task, size in dataclasses.asdict(stage.batch).items():
        if 0 < size < ranks:
            raise UserError(f"{here}: batch.{task} is {size}, fewer than the {ranks} ranks; raise it or use fewer")


def _check_evaluation(recipe: Recipe, numbers: Sequence[int], where: str) -> None:
    every, pools, best = recipe.evaluation.every, recipe.evaluation.pools, recipe.checkpoint.best
    if twice := sorted({pool for pool in pools if pools.count(pool) > 1}):
        raise UserError(f"{where}: evaluation.pools names {twice[0]!r} more than once; leave one out")
    if every and not pools and not any(stage.kind.own_held_out for stage in recipe.stages):
        raise UserError(
            f"{where}: evaluation.every is {every}, but evaluation.pools names nothing to measure; add held-out data "
            "sets, such as [image-short/mine], or set evaluation.every to 0"
        )
    if best is None:
        return
    if not every:
        raise UserError(
            f"{where}: checkpoint.best is {best!r}, but evaluation.every is 0, so nothing is measured and no "
            "checkpoint would ever be the best; set evaluation.every, or leave checkpoint.best out"
        )
    for number in numbers:
        if not pools and not recipe.stage(number).kind.own_held_out:
            raise UserError(
                f"{where}: checkpoint.best is {best!r}, but stage {number} measures nothing: evaluation.pools is "
                "empty; name held-out data sets there, or leave checkpoint.best out"
            )
    begins = {name for number in numbers for name in recipe.stage(number).kind.metrics}
    if not best.startswith(tuple(begins)):
        raise UserError(
            f"{where}: checkpoint.best is {best!r}, which is not measured on held-out data; what is begins with "
            f"{', '.join(sorted(begins))}, as TensorBoard shows it"
        )


def _check_model(model: ModelConfig, where: str) -> None:
    """The model's sources."""
    text, vision = model.text_weights or model.weights, model.vision_weights or model.weights
    if model.tokenizer is None and not text:
        raise UserError(f"{where}: 'model.tokenizer' is missing; add it, or weights that have one")
    for key, weights in (("text", text), ("vision", vision), ("temperature", text and vision)):
        if getattr(model.override, key) and not weights:
            raise UserError(
                f"{where}: 'model.override.{key}' is set, and there are no weights to override; use 'model.{key}'"
            )
