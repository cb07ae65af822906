"""Rules for a stage that learns from a teacher."""

from __future__ import annotations

from stage_trainer.errors import UserError
from stage_trainer.recipe.schema import Stage
from stage_trainer.recipe.teacher import TeacherConfig


def check_teacher(stage: Stage, here: str) -> None:
    """UserError for what cannot be drawn towards a teacher, and for settings that would do nothing."""
    if stage.teacher is None:
        return
    _check_words(stage.teacher, here)
    if stage.teacher.weight <= 0:
        raise UserError(f"{here}: teacher.weight is {stage.teacher.weight:g}; expected above 0")
    for what in stage.teacher.of:
        _check_taught(stage, what, here)
    if stage.teacher.teaches("image_text") and any(source.names_shards for source in stage.data.image_text):
        raise UserError(
            f"{here}: what a teacher says is kept by the number of a sample, and samples of shards without a manifest "
            "have none; take images and captions out of teacher.of, or index the shards (data-prep index)"
        )
    if stage.teacher.loss == "relational" and stage.loss.exchange == "ring":
        raise UserError(
            f"{here}: loss.exchange is 'ring', and teacher.loss 'relational' compares each embedding with those of "
            "all ranks at once; set teacher.loss to 'cosine', or leave 'exchange' out"
        )
    if stage.teacher.alone:
        _check_alone(stage, here)
    if stage.teacher.scores:
        _check_scores(stage, stage.teacher, here)


def _check_words(teacher: TeacherConfig, here: str) -> None:
    """What it speaks of, and where what it says comes from."""
    if not teacher.of or len(set(teacher.of)) < len(teacher.of):
        raise UserError(
            f"{here}: teacher.of is {list(teacher.of)}; expected one or more of texts, images and captions, each once"
        )
    if teacher.of == ("images",) and teacher.language is not None:
        raise UserError(
            f"{here}: teacher.language is {teacher.language!r}, and teacher.of is [images], which have no language; "
            "leave it out, or add captions"
        )
    if teacher.model is not None and teacher.folder is None:
        raise UserError(f"{here}: teacher.folder is missing; name a folder for what {teacher.model} says")
    if teacher.model is not None:
        return
    if not teacher.scores:
        raise UserError(
            f"{here}: teacher.model is missing; name a model whose embeddings teacher.loss {teacher.loss!r} compares"
        )
    for key in ("folder", "language"):
        if getattr(teacher, key) is not None:
            raise UserError(
                f"{here}: teacher.{key} is {getattr(teacher, key)!r} and there is no teacher.model, so the scores are "
                "those of the data; leave it out, or name a cross-encoder"
            )


def _check_taught(stage: Stage, what: str, here: str) -> None:
    """There are such things, and a tower that learns from them."""
    task, tower = "text" if what == "texts" else "image_text", "image" if what == "images" else "text"
    if not getattr(stage.batch, task):
        others = "images or captions, of data.image_text" if what == "texts" else "texts, of data.text"
        raise UserError(
            f"{here}: 'teacher' is for the {what} of data.{task}, and batch.{task} is 0; raise it, or let teacher.of "
            f"name {others}"
        )
    if getattr(stage.trainable, tower) == "none":
        raise UserError(
            f"{here}: 'teacher' draws the {tower} tower by {what}, and trainable.{tower} is 'none'; let it train, or "
            f"take {what} out of teacher.of"
        )


def _check_alone(stage: Stage, here: str) -> None:
    """What is left when there is no contrastive loss."""
    teacher, graded = stage.teacher, any(source.graded for source in stage.data.text)
    assert teacher is not None
    if stage.loss.kind == "unified" or (graded and teacher.replaces("text")):
        raise UserError(
            f"{here}: teacher.alone is true, and data.text is contrasted or ranked by loss.kind {stage.loss.kind!r} or "
            "'graded'; leave 'alone' out"
        )
    if stage.loss.temperature == "shared" and teacher.only_embeds("image_text"):
        raise UserError(
            f"{here}: loss.temperature is 'shared', and teacher.alone leaves image-text pairs no temperature; leave "
            "one of them out"
        )
    for what, tower, idle in (
        ("images", "image", "images" in stage.unread),
        ("captions", "text", "captions" in stage.unread and not stage.batch.text),
    ):
        if idle and getattr(stage.trainable, tower) != "none":
            raise UserError(
                f"{here}: teacher.alone is true and teacher.of is {list(teacher.of)}, so nothing reads {what}, and "
                f"trainable.{tower} is {getattr(stage.trainable, tower)!r}; set it to 'none', add {what} to "
                "teacher.of, or leave 'alone' out"
            )


def _check_scores(stage: Stage, teacher: TeacherConfig, here: str) -> None:
    """What a cross-encoder is for."""
    if teacher.of != ("texts",):
        raise UserError(
            f"{here}: teacher.of is {list(teacher.of)}, and teacher.loss 'margin_mse' is for triplets of texts; leave "
            "'of' out, or take another teacher.loss"
        )
    if not teacher.language and any(source.target_language for source in stage.data.text):
        raise UserError(
            f"{here}: data.text has a 'target_language', and without teacher.language the student reads the texts that "
            "the teacher read, the first ones; set teacher.language, or leave 'target_language' out"
        )
    if stage.loss.kind == "unified" or any(source.graded for source in stage.data.text):
        raise UserError(
            f"{here}: teacher.loss 'margin_mse' is for triplets with hard negatives, for which loss.kind 'unified' and "
            "'graded' pairs have no place; leave them out, or take another teacher.loss"
        )
