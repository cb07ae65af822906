"""`stage-trainer export`: takes the model out of a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from stage_trainer.commands.common import find_model
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from stage_trainer.dual_encoder import DualEncoder

FORMATS = {
    "trilith": "for stage_trainer.DualEncoder alone; any model, adapters as they are",
    "jina-clip": "the layout of the published jina-clip-v2, for its code and what is built on that",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    p = commands.add_parser(
        "export",
        help="take the model out of a checkpoint or a finished stage",
        description="Writes a directory for stage_trainer.DualEncoder.from_pretrained. Of a stage's folder it takes "
        "the newest checkpoint, and says so; name a step-… folder for another.",
    )
    p.add_argument("checkpoint", type=Path, help="a checkpoint, a stage's folder (its newest checkpoint), or a model")
    p.add_argument("out", type=Path, help="the directory to write; it must not exist")
    p.add_argument("--format", choices=FORMATS, default="trilith", help=f"{formats} (default: %(default)s)")
    p.add_argument(
        "--lora",
        choices=("merged", "kept"),
        default=None,
        help="of jina-clip; merged: the text tower's default adapter is added to its weights; kept: it stays apart "
        "(default: kept)",
    )
    p.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default=None,
        help="of jina-clip's weights (default: float16, as published)",
    )
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already; name another place or move it away")
    if arguments.format != "jina-clip" and (arguments.lora or arguments.dtype):
        raise UserError("--lora and --dtype are for --format jina-clip; leave them out")
    found, _ = find_model(arguments.checkpoint)
    from stage_trainer.dual_encoder import DualEncoder

    model = DualEncoder.from_pretrained(found)
    if arguments.format == "jina-clip":
        _write_jina_clip(model, arguments)
    else:
        model.save_pretrained(arguments.out)
    print(
        f"wrote {arguments.out}\n"
        f"  in Python:  stage_trainer.DualEncoder.from_pretrained({str(arguments.out)!r})\n"
        f"  figures:    stage-trainer evaluate {shlex.quote(str(arguments.out))} DATA\n"
        f'  picture:    stage-trainer search {shlex.quote(str(arguments.out))} DATA "some words"'
    )


def _write_jina_clip(model: DualEncoder, arguments: argparse.Namespace) -> None:
    from stage_trainer.formats import jina_clip

    dtype = arguments.dtype or "float16"
    written = jina_clip.write(model, arguments.out, lora=arguments.lora or "kept", dtype=dtype)
    if written.merged:
        print(f"the adapter {written.merged} is merged into the text tower's weights; --lora kept leaves it apart")
    if written.left_out:
        print(f"not in this directory: the adapters {', '.join(written.left_out)}")
    if written.rounded:
        print(f"{len(written.rounded)} tensors are rounded to {dtype}; --dtype float32 keeps every number")
