"""Rules for one stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from stage_trainer.errors import UserError
from stage_trainer.recipe.kinds import PAIRS
from stage_trainer.recipe.schema import NEW_TEMPERATURE, GradientCache, ModelConfig, Recipe, Stage
from stage_trainer.recipe.sources import Source
from stage_trainer.recipe.teacher_rules import check_teacher
from stage_trainer.recipe.text_rules import check_text_stage


def check_stage(recipe: Recipe, number: int, here: str) -> None:
    """UserError if the stage, whose numbers are in their ranges, violates a rule."""
    stage = recipe.stage(number)
    sizes = asdict(stage.batch)
    if beside := [task for task, size in sizes.items() if size and stage.kind is not PAIRS and task != stage.kind.task]:
        raise UserError(
            f"{here}: batch.{stage.kind.task} and batch.{beside[0]} are both set; {stage.kind.title} is a stage of its "
            f"own, so set batch.{beside[0]} to 0 or move one of them to another stage"
        )
    (_check_pairs if stage.kind.both_towers else check_text_stage)(recipe, number, here)
    for task, size in sizes.items():
        if size and not getattr(stage.data, task):
            raise UserError(f"{here}: batch.{task} is {size} but data.{task} names no data; add sources or set it to 0")
    _check_rates(stage, here)
    _check_gradient_cache(stage, here)
    _check_fp8(recipe.precision, stage, here)
    if stage.carry_optimizer and (number == 1 or recipe.stage(number - 1).task != stage.task):
        raise UserError(
            f"{here}: 'carry_optimizer' continues with the moments of a previous stage of the same kind, and there is "
            "none; leave it out"
        )


def _check_pairs(recipe: Recipe, number: int, here: str) -> None:
    """A stage that trains on pairs."""
    model, stage = recipe.model, recipe.stage(number)
    if model.vision is None and not (model.weights or model.vision_weights):
        raise UserError(
            f"{here} trains both towers, and 'model.vision' is missing; add it, or weights that have it "
            "(model.weights, model.vision_weights)"
        )
    if not stage.batch.image_text and not stage.batch.text:
        raise UserError(f"{here}: all batch sizes are 0; nothing would be trained")
    for task in ("image_text", "text"):
        if any(source.rate <= 0 for source in getattr(stage.data, task)):
            raise UserError(f"{here}: every rate of data.{task} should be above 0; leave out what is not wanted")
    if any(source.graded for source in stage.data.image_text):
        raise UserError(f"{here}: 'graded' is for text pairs; leave it out of data.image_text")
    if stage.loss.kind != "multi_task" and any(source.graded for source in stage.data.text):
        raise UserError(
            f"{here}: data.text has 'graded' pairs, which are ranked instead of contrasted, and loss.kind is "
            f"{stage.loss.kind!r}; leave them to a stage of their own, or set loss.kind to 'multi_task'"
        )
    for name in ("resolution", "patch_dropout"):
        _check_schedule(stage, name, here)
    if not all(0 <= rate < 1 for _, rate in stage.patch_dropout):
        raise UserError(f"{here}: 'patch_dropout' rates should be at least 0 and below 1; found {stage.patch_dropout}")
    for name in ("scale", "ratio"):
        low, high = getattr(stage.augmentation, name)
        if low > high:
            raise UserError(f"{here}: augmentation.{name} is [{low:g}, {high:g}]; expected the lower one first")
    _check_shards(stage, here)
    _check_embedding_cache(stage, here)
    check_teacher(stage, here)
    _check_loss(model, stage, here)
    _check_tasks(stage, here)


def _check_loss(model: ModelConfig, stage: Stage, here: str) -> None:
    """The prefixes that it compares, and a temperature above its floor."""
    dims = stage.loss.dims
    if not dims or len(set(dims)) < len(dims):
        raise UserError(
            f"{here}: loss.dims is {list(dims)}; expected the prefixes of an embedding that are to be used alone, "
            "each once, such as [1024, 512, 256]"
        )
    if stage.loss.weights and len(stage.loss.weights) != len(dims):
        raise UserError(
            f"{here}: loss.weights has {len(stage.loss.weights)} numbers for {len(dims)} dims; expected one for each "
            "of loss.dims, in the same order"
        )
    temperature = model.override.temperature or model.temperature
    if temperature is None and not (model.weights or (model.text_weights and model.vision_weights)):
        temperature = NEW_TEMPERATURE
    if temperature is not None and temperature < stage.loss.min_temperature and stage.loss.temperature != "fixed":
        raise UserError(
            f"{here}: model.temperature is {temperature:g}, below loss.min_temperature, "
            f"{stage.loss.min_temperature:g}; raise the one or lower the other"
        )


def _check_shards(stage: Stage, here: str) -> None:
    """Shards that a path names one by one, and settings that are for these alone."""
    if named := [source.path for source in stage.data.text if source.names_shards]:
        raise UserError(
            f"{here}: data.text has {named[0]!r}, and only data.image_text takes shards without a manifest; name the "
            "folder of a data set (data-prep import, data-prep index)"
        )
    for source in (*stage.data.image_text, *stage.data.text):
        if source.shuffle_buffer < 1:
            raise UserError(f"{here}: {source.path!r} has shuffle_buffer {source.shuffle_buffer}; expected at least 1")
        for key, default in (("shuffle_buffer", Source.shuffle_buffer), ("caption_key", None)):
            if not source.names_shards and getattr(source, key) != default:
                raise UserError(
                    f"{here}: {source.path!r} has {key!r}, which is for shards that a path names one by one "
                    "({00000..00099}.tar); leave it out"
                )
    if stage.embedding_cache is not None and any(source.names_shards for source in stage.data.image_text):
        raise UserError(
            f"{here}: 'embedding_cache' keeps embeddings by the number of a sample, and samples of shards without a "
            "manifest have none; leave it out, or index the shards (data-prep index)"
        )
    if stage.augmentation.views and any(source.names_shards for source in stage.data.image_text):
        raise UserError(
            f"{here}: augmentation.views is {stage.augmentation.views}, and of shards without a manifest an image has "
            "no number by which its views could stay the same; set it to 0, or index the shards (data-prep index)"
        )


def _check_embedding_cache(stage: Stage, here: str) -> None:
    """Fixed views, and embeddings that are kept of them."""
    a = stage.augmentation
    if a.views == 1 and (a.flip or a.color):
        raise UserError(
            f"{here}: augmentation.views is 1, the image as it is, so 'flip' and 'color' change nothing; leave them "
            "out, or raise 'views'"
        )
    if stage.embedding_cache is None:
        return
    if not stage.stored:
        idle = "" if stage.batch.image_text else " (batch.image_text is 0, so the image tower takes no part)"
        idle = " (no loss reads an image)" if "images" in stage.unread else idle
        silent = "" if stage.reads("captions") or stage.reads("texts") else " (no loss reads a text)"
        raise UserError(
            f"{here}: 'embedding_cache' keeps the embeddings of a tower that does not train, and trainable.image is "
            f"{stage.trainable.image!r}{idle} and trainable.text {stage.trainable.text!r}{silent}; set one to 'none' "
            "or 'projector', or leave 'embedding_cache' out"
        )
    if "image" not in stage.stored:
        return
    for found, wanted in (
        (not a.views and "augmentation.views is 0, so every draw of an image is another", "set it to 1 or more"),
        (any(rate for _, rate in stage.patch_dropout) and "'patch_dropout' is above 0", "leave it out"),
        (stage.loss.views and "loss.image_views is true", "set it to false"),
    ):
        if found:
            raise UserError(
                f"{here}: 'embedding_cache' keeps the embeddings of images that never change, and {found}; {wanted}"
            )


def _check_schedule(stage: Stage, name: str, here: str) -> None:
    """[[0, value], [later step, value], …]"""
    starts = [start for start, _ in getattr(stage, name)]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise UserError(f"{here}: {name!r} should be [[0, …], [later step, …], …] with rising steps; found {starts}")
    if starts[-1] >= stage.steps:
        raise UserError(
            f"{here}: {name!r} changes at step {starts[-1]}, but the stage ends after {stage.steps} steps "
            f"(0 to {stage.steps - 1}); remove that change, or move it to an earlier step"
        )


def _check_tasks(stage: Stage, here: str) -> None:
    """When each task takes part."""
    starts = {task: getattr(stage.task_start, task) for task in ("image_text", "text") if getattr(stage.batch, task)}
    for task, start in starts.items():
        if start >= stage.steps:
            raise UserError(
                f"{here}: task_start.{task} is {start}, but the stage ends after {stage.steps} steps; "
                f"lower it, or set batch.{task} to 0"
            )
    if (first := min(starts.values())) > 0:
        raise UserError(f"{here}: no task takes part before step {first}; let one of {', '.join(starts)} start at 0")
    if stage.loss.kind == "unified":
        if len(starts) < 2:
            raise UserError(f"{here}: a unified loss is over both tasks; give 'batch' an image_text and a text size")
        if any(starts.values()):
            raise UserError(f"{here}: a unified loss is over both tasks in every step; leave 'task_start' out")
    elif stage.loss.temperature == "shared" and len(starts) < 2:
        raise UserError(
            f"{here}: loss.temperature is 'shared', and only batch.{next(iter(starts))} is above 0; give 'batch' both "
            "tasks, or leave it out"
        )
    if stage.batch.image_text == 1 and stage.loss.kind != "unified" and not stage.only_embeds("image_text"):
        raise UserError(f"{here}: batch.image_text is 1, and a single pair has no negatives; raise it")


def _check_rates(stage: Stage, here: str) -> None:
    """A tower that trains, a rate for all that does, and a schedule that fits into the stage."""
    towers = _learning_towers(stage)
    if not towers:
        why = "" if stage.trainable.image == "none" else " (batch.image_text is 0, so the image tower takes no part)"
        raise UserError(
            f"{here}: nothing would be trained but a temperature: trainable.image is {stage.trainable.image!r}{why} "
            "and trainable.text is 'none'; let one of the towers train"
        )
    for name in ("image", "text"):
        learners = [words for tower, words in (*towers.items(), *_learning_scalars(stage)) if tower == name]
        if learners and getattr(stage.lr, name) is None:
            raise UserError(
                f"{here}: lr.{name} is missing, and {' and '.join(learners)} train{'s' * (len(learners) == 1)} at it; "
                f"add it, such as lr: {{{name}: 1e-4}} (0 to hold {'it' if len(learners) == 1 else 'them'})"
            )
    if not any(getattr(stage.lr, tower) for tower in towers):
        raise UserError(f"{here}: every rate under 'lr' at which a tower trains is 0; nothing would be trained")
    if stage.warmup_steps > stage.steps:
        raise UserError(
            f"{here}: warmup_steps is {stage.warmup_steps}, more than the {stage.steps} steps of the stage, so the "
            "rate would never reach lr; lower it"
        )


# By the rate at which they train; see `ContrastiveObjective.parameter_groups` and `set_trainable`.
def _learning_towers(stage: Stage) -> dict[str, str]:
    parts = {"adapters": "'s adapters", "projector": "'s projector", "all": ""}
    found = {}
    if stage.trainable.image != "none" and stage.batch.image_text:
        found["image"] = f"the image tower{parts[stage.trainable.image]}"
    if stage.trainable.text != "none":
        found["text"] = f"the text tower{parts[stage.trainable.text]}"
    return found


def _learning_scalars(stage: Stage) -> Iterator[tuple[str, str]]:
    for tower, task, words in (("image", "image_text", "the image-text loss"), ("text", "text", "the text loss")):
        if getattr(stage.batch, task):
            if stage.loss.learns_temperature(task) and not stage.only_embeds(task):
                yield tower, f"the temperature of {words}"
            if stage.loss.kind == "sigmoid" and not (stage.teacher and stage.teacher.replaces(task)):
                yield tower, f"the bias of {words}"


def _check_gradient_cache(stage: Stage, here: str) -> None:
    cache = stage.gradient_cache
    if isinstance(cache, GradientCache) and (cache.images < 0 or cache.tokens < 0 or not cache.images + cache.tokens):
        raise UserError(
            f"{here}: 'gradient_cache' should give the images and the tokens of one forward pass, such as "
            "{images: 256, tokens: 16384} (0: all of them), or be 'auto'; leave it out for none"
        )


def _check_fp8(precision: str, stage: Stage, here: str) -> None:
    if not stage.fp8:
        return
    if precision == "fp32":
        raise UserError(f"{here}: 'fp8' is for towers in bfloat16, and precision is 'fp32'; leave one of them out")
    if stage.deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"{here}: 'fp8' casts weights once a step, and under deepspeed.zero_optimization.stage 3 they are not "
            "whole so long; set the stage to 2 or less, or leave 'fp8' out"
        )
