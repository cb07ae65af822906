"""`stage-trainer export`: takes the model out of a checkpoint."""

from __future__ import annotations

import argparse
import shlex

from stage_trainer.commands.common import a_path, find_model
from stage_trainer.errors import UserError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "export",
        help="take the model out of a checkpoint or a finished stage",
        description="Writes a directory for stage_trainer.DualEncoder.from_pretrained. Of a stage's folder it takes "
        "the newest checkpoint, and says so; name a step-… folder for another.",
    )
    p.add_argument("checkpoint", type=a_path, help="a checkpoint, or a stage's folder (its newest checkpoint)")
    p.add_argument("out", type=a_path, help="the directory to write; it must not exist")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.files import check_can_write, writing

    with writing(arguments.out):
        if arguments.out.exists():
            raise UserError(f"{arguments.out} exists already; name another place or move it away")
    check_can_write(arguments.out)
    model, _ = find_model(arguments.checkpoint)
    from stage_trainer.dual_encoder import DualEncoder

    DualEncoder.from_pretrained(model).save_pretrained(arguments.out)
    print(
        f"wrote {arguments.out}\n"
        f"  in Python:  stage_trainer.DualEncoder.from_pretrained({str(arguments.out)!r})\n"
        f"  figures:    stage-trainer evaluate {shlex.quote(str(arguments.out))} DATA\n"
        f'  picture:    stage-trainer search {shlex.quote(str(arguments.out))} DATA "some words"'
    )
