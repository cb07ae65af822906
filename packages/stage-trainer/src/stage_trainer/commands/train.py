"""`stage-trainer train`: trains a stage, or shows what it would be."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stage_trainer.commands.common import add_recipe, add_settings
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from stage_trainer.recipe import Recipe


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("train", help="train a stage, or resume it where it stopped")
    add_recipe(p)
    p.add_argument("--stage", type=int, required=True, help="the stage's number, from 1")
    p.add_argument("--dry-run", action="store_true", help="print parameters and settings; train nothing")
    p.add_argument("--start-over", action="store_true", help="move what this stage has aside and start it again")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_settings(p, help="overrides, such as batch.text=64 or optimizer.name=adamw")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.measures import check_best_of
    from stage_trainer.recipe.read import load

    world = os.environ.get("WORLD_SIZE", "")  # set by every launcher
    ranks = int(world) if world.isdecimal() else 1
    try:
        loaded = load(arguments.recipe, arguments.settings, arguments.stage, ranks=ranks)
        check_best_of(loaded.recipe, [arguments.stage])
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        sys.exit(2)  # the first rank of this machine shows the message
    if arguments.dry_run:
        from stage_trainer.commands.dry_run import dry_run

        print(dry_run(loaded, arguments.stage))
        return
    from stage_trainer.run.alone import hold_folder
    from stage_trainer.run.stop import leave_when_asked

    rank = int(os.environ.get("RANK", 0))
    with leave_when_asked(rank), hold_folder(Path(loaded.recipe.output), rank) as refusal:
        if rank == 0:
            print("loading PyTorch …", flush=True)
            refusal = refusal or _changed_teacher(loaded.recipe, arguments.stage)
        from stage_trainer.trainer import train

        train(loaded.recipe, arguments.stage, start_over=arguments.start_over, refusal=refusal)


def _changed_teacher(recipe: Recipe, number: int) -> UserError | None:
    from stage_trainer.commands.ask_teacher import check_teacher

    try:
        check_teacher(recipe, number)
    except UserError as error:
        return error
    return None
