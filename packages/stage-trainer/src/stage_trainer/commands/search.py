"""`stage-trainer search`: a picture of what a model finds."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage_trainer.commands.common import DATA, MODEL, check_can_write, find_model, say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("search", help="draw a picture: what a model finds for some queries")
    p.add_argument("model", type=Path, help=MODEL)
    p.add_argument("data", type=Path, help=f"where the images are: {DATA}")
    p.add_argument("--out", type=Path, default=Path("search.png"), help="the picture (default: %(default)s)")
    p.add_argument("queries", nargs="*", help="texts; without any, twelve of the data's own captions are searched for")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.held_out import find

    check_can_write(arguments.out)
    find(arguments.data)  # before PyTorch is loaded
    model, _ = find_model(arguments.model)
    from stage_trainer.evaluation.picture import draw_search

    draw_search(model, arguments.data, arguments.queries, arguments.out, say)
    print(f"wrote {arguments.out}")
