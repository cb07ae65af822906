"""`stage-trainer embed`: makes what a stage reads from the disk instead of computing it at every step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import TYPE_CHECKING

from stage_trainer.commands.common import add_recipe, add_settings, say
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from stage_trainer.recipe import Recipe

_DOES = """What a stage reads from the disk: the embeddings of a frozen tower (`embedding_cache`), and what a
teacher says of texts (`teacher`). What is there already stays: after an interruption the same command goes on."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "embed", help="make the embeddings that a stage reads from the disk, before it is trained", description=_DOES
    )
    add_recipe(p)
    p.add_argument("--stage", type=int, required=True, help="the stage's number, from 1")
    add_settings(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.commands.ask_teacher import ask_teacher
    from stage_trainer.recipe.read import load

    recipe, number = load(arguments.recipe, arguments.settings, arguments.stage).recipe, arguments.stage
    stage = recipe.stage(number)
    asked = stage.teacher is not None and stage.teacher.model is not None
    if stage.embedding_cache is None and not asked:
        raise UserError(
            f"{recipe.name}: stage {number} reads no embeddings from the disk; name a folder for those of a frozen "
            "tower as embedding_cache, or a model to learn from as teacher.model"
        )
    say("loading PyTorch …")
    if asked:
        ask_teacher(recipe, stage)
    if stage.embedding_cache is not None:
        _run_towers(recipe, number)
    print(f"everything that stage {number} reads from the disk is there")


def _run_towers(recipe: Recipe, number: int) -> None:
    """The frozen towers over the stage's texts and images, at each resolution, as the stage itself would."""
    import torch

    from stage_trainer.build import load_tokenizer
    from stage_trainer.checkpoint.resume import settings, starting_point
    from stage_trainer.checkpoint.state import RunState
    from stage_trainer.run.device import uses_gpu
    from stage_trainer.run.environment import native_precision, quiet, set_threads, versions
    from stage_trainer.run.rendezvous import initialize_distributed
    from stage_trainer.tasks import make_task

    quiet()
    cuda = uses_gpu(recipe.device, recipe.precision, say)
    rank, world, device = initialize_distributed(recipe.output, cuda=cuda, recipe={"embed": number})
    set_threads(world)
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision=native_precision(device))
    task = make_task(recipe, number)
    torch.manual_seed(task.seed)
    task.check_configs(fetch=True)
    tokenizer = load_tokenizer(recipe)
    batches = task.make_batches(tokenizer, rank, world)
    state = RunState(settings(recipe, number), batches.fingerprint, versions())
    model, _ = starting_point(task, state, tokenizer)
    step = min(state.step, task.stage.steps - 1)
    while step < task.stage.steps:
        step = task.set_up_segment(model.cpu(), step, None)  # where training resamples, whose bits these have to be
        model.to(device)
        task.prepare(model, batches, device, contextlib.nullcontext)
