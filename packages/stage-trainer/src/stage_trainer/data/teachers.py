"""What a stage's teacher says, by the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.shards import Dataset

from stage_trainer.data.samples import SampleCache
from stage_trainer.data.scored_texts import ScoredTexts
from stage_trainer.data.taught import Said
from stage_trainer.data.taught_images import TaughtCaptions, TaughtImages
from stage_trainer.data.taught_texts import TaughtTexts
from stage_trainer.recipe.teacher import TeacherConfig


def said(
    teacher: TeacherConfig, texts: Sequence[Dataset], images: Sequence[Dataset], cache: SampleCache
) -> tuple[Said, ...]:
    """What a teacher with a model says of a stage's data sets of texts and of captioned images, kind by kind."""
    if teacher.scores:
        return (ScoredTexts(teacher, texts, cache),)
    kinds: tuple[tuple[type[Said], Sequence[Dataset]], ...]
    kinds = (TaughtTexts, texts), (TaughtImages, images), (TaughtCaptions, images)
    return tuple(kind(teacher, sources, cache) for kind, sources in kinds if kind.of in teacher.of)
