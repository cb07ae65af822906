"""`stage-trainer export`: takes the model out of a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from stage_trainer.commands.common import find_model
from stage_trainer.errors import UserError

FORMATS = {
    "common": "one directory for Trilith, sentence-transformers, transformers and timm, with a model card",
    "trilith": "for stage_trainer.DualEncoder alone; any model, adapters as they are",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    p = commands.add_parser(
        "export",
        help="take the model out of a checkpoint or a finished stage, for other libraries too",
        description="Writes a directory that stage_trainer.DualEncoder, sentence-transformers, transformers and timm "
        "open; its README.md says how. Of a stage's folder it takes the newest checkpoint, and says so; name a "
        "step-… folder for another. What `stage-trainer evaluate` found of a stage goes into the card.",
    )
    p.add_argument("checkpoint", type=Path, help="a checkpoint, a stage's folder (its newest checkpoint), or a model")
    p.add_argument("out", type=Path, help="the directory to write; it must not exist")
    p.add_argument("--format", choices=FORMATS, default="common", help=f"{formats} (default: %(default)s)")
    p.add_argument(
        "--lora",
        choices=("merged", "kept"),
        default="merged",
        help="merged: the text tower's default adapter is added to its weights, and every library gives its vectors; "
        "kept: each adapter is a PEFT folder, text/NAME, for further training; not for sentence-transformers "
        "(default: %(default)s)",
    )
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already; name another place or move it away")
    found, checkpoint = find_model(arguments.checkpoint)
    from stage_trainer.dual_encoder import DualEncoder

    model = DualEncoder.from_pretrained(found)
    if arguments.format == "trilith":
        model.save_pretrained(arguments.out)
    else:
        from stage_trainer.formats import common, history
        from stage_trainer.formats.card import card

        past = history.of(found, checkpoint)
        name = arguments.out.resolve().name
        adapters = common.write(model, arguments.out, arguments.lora, lambda become: card(name, model, become, past))
        _say_adapters(adapters.merged, adapters.left_out, adapters.kept)
    print(
        f"wrote {arguments.out}\n"
        f"  in Python:  stage_trainer.DualEncoder.from_pretrained({str(arguments.out)!r})\n"
        f"  figures:    stage-trainer evaluate {shlex.quote(str(arguments.out))} DATA\n"
        f'  picture:    stage-trainer search {shlex.quote(str(arguments.out))} DATA "some words"'
    )
    if arguments.format == "common":
        print(f"  elsewhere:  {arguments.out / 'README.md'} has an example for each library")


def _say_adapters(merged: tuple[str, ...], left_out: tuple[str, ...], kept: tuple[str, ...]) -> None:
    if merged:
        print(f"the adapter {merged[0]} is merged into the text tower's weights; --lora kept leaves it apart")
    if left_out:
        print(f"not in this directory: the adapters {', '.join(left_out)}; --lora kept exports all of them")
    if kept:
        print(f"the adapters {', '.join(kept)} are PEFT folders; sentence-transformers needs --lora merged")
