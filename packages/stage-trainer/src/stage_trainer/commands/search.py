"""`stage-trainer search`: a picture of what a model finds."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage_trainer.commands.common import (
    DATA,
    MODEL,
    a_path,
    add_max_pixels,
    check_output,
    find_model,
    max_pixels_of,
    say,
)
from stage_trainer.errors import UserError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("search", help="draw a picture: what a model finds for some queries")
    p.add_argument("model", type=a_path, help=MODEL)
    p.add_argument("data", type=a_path, help=f"where the images are: {DATA}")
    p.add_argument("--out", type=a_path, default=Path("search.png"), help="the picture (default: %(default)s)")
    p.add_argument("queries", nargs="*", help="texts; without any, twelve of the data's own captions are searched for")
    add_max_pixels(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from stage_trainer.evaluation.held_out import find

    max_pixels = max_pixels_of(arguments)
    check_output(arguments.out)
    if Image.registered_extensions().get(arguments.out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"no picture can be written to {arguments.out}; name a file that ends in .png")
    if blank := [query for query in arguments.queries if not query.strip()]:
        raise UserError(f"a query is {blank[0]!r}; give some words, or no query at all")
    find(arguments.data)  # before PyTorch is loaded
    model, _ = find_model(arguments.model)
    from stage_trainer.evaluation.picture import draw_search

    draw_search(model, arguments.data, arguments.queries, arguments.out, say, max_pixels=max_pixels)
    print(f"wrote {arguments.out}")
