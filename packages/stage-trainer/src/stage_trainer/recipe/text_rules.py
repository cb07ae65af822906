"""Rules for a stage that trains the text tower alone, on single texts."""

from __future__ import annotations

from stage_trainer.errors import UserError
from stage_trainer.recipe.address import names_shards
from stage_trainer.recipe.schema import Recipe


def check_text_stage(recipe: Recipe, number: int, here: str) -> None:
    """UserError if the stage violates a rule that those of pairs do not have."""
    stage = recipe.stage(number)
    kind, paths = stage.kind, getattr(stage.data, stage.kind.task)
    for key, set_ in (
        ("embedding_cache", stage.embedding_cache), ("teacher", stage.teacher),
        ("loss.exchange", stage.loss.exchange != "auto"),
    ):  # fmt: skip
        if set_:
            raise UserError(
                f"{here}: {key!r} is for stages of pairs, and batch.{kind.task} makes this one of {kind.title}; leave "
                "it out"
            )
    if number > 1 and recipe.stage(number - 1).kind.both_towers:
        raise UserError(
            f"{here}: {kind.title} follows a stage that trains embeddings, whose image tower and adapters it would "
            "lose; put it first"
        )
    if stage.trainable.text != "all":
        raise UserError(
            f"{here}: trainable.text is {stage.trainable.text!r}; {kind.title} is for all weights of the text tower, "
            "so leave it out"
        )
    if stage.gradient_cache == "auto":
        raise UserError(
            f"{here}: 'gradient_cache: auto' is for stages of pairs; {kind.title} needs the tokens of one pass, such "
            "as {tokens: 16384}, or nothing"
        )
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise UserError(f"{here}: data.{kind.task} names {twice[0]!r} more than once; leave one out")
    if named := [path for path in paths if names_shards(path)]:
        raise UserError(f"{here}: data.{kind.task} has {named[0]!r}; shards without a manifest are for data.image_text")
