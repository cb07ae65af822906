"""The ways to train a stage. What differs between them lives here; a new one is a file and a line in `TASKS`."""

from __future__ import annotations

from stage_trainer.recipe import Recipe
from stage_trainer.tasks.contrastive import ContrastiveTask
from stage_trainer.tasks.distill import DistillTask
from stage_trainer.tasks.margins import MarginsTask
from stage_trainer.tasks.masked_lm import MaskedLMTask
from stage_trainer.tasks.task import Task

__all__ = ["TASKS", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {
    "contrastive": ContrastiveTask,
    "distill": DistillTask,
    "margins": MarginsTask,
    "masked_lm": MaskedLMTask,
}
"""By `Stage.task`."""


def make_task(recipe: Recipe, number: int) -> Task:
    """The task of a stage, from 1."""
    return TASKS[recipe.stage(number).task](recipe, number)
