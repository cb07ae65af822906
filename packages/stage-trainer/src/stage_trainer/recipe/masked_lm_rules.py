"""Rules for a stage of masked-language-model training."""

from __future__ import annotations

from stage_trainer.errors import UserError
from stage_trainer.recipe.address import names_shards
from stage_trainer.recipe.schema import Recipe


def check_masked_lm(recipe: Recipe, number: int, here: str) -> None:
    """UserError if the stage violates a rule that is for its kind alone."""
    stage = recipe.stage(number)
    for task in ("image_text", "text"):
        if getattr(stage.batch, task):
            raise UserError(
                f"{here}: batch.masked_lm and batch.{task} are both set; masked-language-model training is a stage of "
                f"its own, so set batch.{task} to 0 or move one of them to another stage"
            )
    for key, set_ in (
        ("embedding_cache", stage.embedding_cache), ("teacher", stage.teacher),
        ("loss.exchange", stage.loss.exchange != "auto"),
    ):  # fmt: skip
        if set_:
            raise UserError(
                f"{here}: {key!r} is for stages of pairs, and batch.masked_lm makes this one of masked-language-model "
                "training; leave it out"
            )
    if number > 1 and recipe.stage(number - 1).kind.has_encoder:
        raise UserError(
            f"{here}: masked-language-model training follows a stage that trains embeddings, whose image tower and "
            "adapters it would lose; put it first"
        )
    if stage.trainable.text != "all":
        raise UserError(
            f"{here}: trainable.text is {stage.trainable.text!r}; masked-language-model training is for all weights of "
            "the text tower, so leave it out"
        )
    if stage.gradient_cache == "auto":
        raise UserError(
            f"{here}: 'gradient_cache: auto' is for stages of pairs; masked-language-model training needs the "
            "tokens of one pass, such as {tokens: 16384}, or nothing"
        )
    if twice := sorted({path for path in stage.data.masked_lm if stage.data.masked_lm.count(path) > 1}):
        raise UserError(f"{here}: data.masked_lm names {twice[0]!r} more than once; leave one out")
    if named := [path for path in stage.data.masked_lm if names_shards(path)]:
        raise UserError(f"{here}: data.masked_lm has {named[0]!r}; shards without a manifest are for data.image_text")
