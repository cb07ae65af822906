"""`stage-trainer embed`: makes what a stage reads from the disk instead of computing it at every step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

from stage_trainer.commands.common import add_recipe, add_settings, say
from stage_trainer.errors import UserError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "embed",
        help="make the embeddings that a stage keeps on the disk, before it is trained",
        description="Runs a frozen image tower over the stage's images once (`image_cache`). What is there stays: "
        "after an interruption the same command goes on.",
    )
    add_recipe(p)
    p.add_argument("--stage", type=int, required=True, help="the stage's number, from 1")
    add_settings(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.recipe.read import load

    recipe = load(arguments.recipe, arguments.settings, arguments.stage).recipe
    stage = recipe.stage(arguments.stage)
    if stage.image_cache is None:
        raise UserError(
            f"{recipe.name}: stage {arguments.stage} keeps no embeddings; with a frozen image tower "
            "(trainable.image: none) name a folder for them as image_cache"
        )
    say("loading PyTorch …")
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
    rank, world, device = initialize_distributed(recipe.output, cuda=cuda, recipe={"embed": arguments.stage})
    set_threads(world)
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision=native_precision(device))
    task = make_task(recipe, arguments.stage)
    torch.manual_seed(task.seed)
    task.check_configs(fetch=True)
    tokenizer = load_tokenizer(recipe)
    batches = task.make_batches(tokenizer, rank, world)
    state = RunState(settings(recipe, arguments.stage), batches.fingerprint, versions())
    model, _ = starting_point(task, state, tokenizer)
    step = min(state.step, stage.steps - 1)
    while step < stage.steps:
        step = task.set_up_segment(model, step, None)
        model.to(device)
        task.prepare(model, batches, device, contextlib.nullcontext)
    if rank == 0:
        print(f"everything that stage {arguments.stage} reads is in {stage.image_cache}")
