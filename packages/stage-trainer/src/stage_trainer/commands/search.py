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

PICTURE = Path("search.png")
TOP_K = 10


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "search",
        help="draw a picture: what a model finds for some queries; or search files of vectors",
        description="Draws what a model finds among the images of DATA. Of a file of vectors (.parquet or .npy) that "
        "`stage-trainer encode` wrote, it prints the nearest ids with their scores, in whatever precision they are.",
    )
    p.add_argument("model", type=a_path, help=MODEL)
    p.add_argument("data", type=a_path, help=f"where the images are: {DATA}; or a file of vectors")
    p.add_argument("--out", type=a_path, help=f"the picture (default: {PICTURE})")
    p.add_argument("queries", nargs="*", help="texts; without any, twelve of the data's own captions are searched for")
    add_max_pixels(p)
    group = p.add_argument_group("of files of vectors")
    group.add_argument("--also", type=a_path, action="append", metavar="FILE",
                       help="a further one, searched with it; may be repeated")  # fmt: skip
    group.add_argument("--top-k", type=int, metavar="N", help=f"how many are found (default: {TOP_K})")
    group.add_argument("--rescore-multiplier", type=int, metavar="N",
                       help="of binary and ubinary: so many times as many are taken by their signs, and then ranked by "
                       "the query's own numbers (default: 4)")  # fmt: skip
    group.add_argument(
        "--task", "--prompt-name", help="of the queries: its instruction, and its adapter if there is one"
    )
    group.add_argument("--other-files", action="store_true", default=None,
                       help="search although other files of a model made the vectors: an export and its stage are the "
                       "same model in different files")  # fmt: skip
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if blank := [query for query in arguments.queries if not query.strip()]:
        raise UserError(f"a query is {blank[0]!r}; give some words, or no query at all")
    if arguments.data.suffix in (".parquet", ".npy"):
        _search_vectors(arguments)
    else:
        _draw(arguments)


def _draw(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from stage_trainer.evaluation.held_out import find

    for name in ("also", "top_k", "rescore_multiplier", "task", "other_files"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is of files of vectors (.parquet, .npy); {arguments.data} is none"
            )
    max_pixels, out = max_pixels_of(arguments), arguments.out or PICTURE
    check_output(out)
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"no picture can be written to {out}; name a file that ends in .png")
    find(arguments.data)  # before PyTorch is loaded
    model, _ = find_model(arguments.model)
    from stage_trainer.evaluation.picture import draw_search

    draw_search(model, arguments.data, arguments.queries, out, say, max_pixels=max_pixels)
    print(f"wrote {out}")


def _search_vectors(arguments: argparse.Namespace) -> None:
    if arguments.out is not None or arguments.max_pixels is not None:
        raise UserError(
            f"--out and --max-pixels are of the picture; {arguments.data} holds vectors, what is found is printed"
        )
    if not arguments.queries:
        raise UserError(f"{arguments.data} holds vectors: say in words what to search for")
    for name in ("top_k", "rescore_multiplier"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} is {number}; expected a whole number from 1")
    from stage_trainer.bulk.stored import open_together
    from stage_trainer.metrics.quantization import BITS

    files = open_together([arguments.data, *(arguments.also or [])])
    stated = files[0].statement
    if arguments.rescore_multiplier is not None and stated.precision not in BITS:
        raise UserError(
            f"--rescore-multiplier is of binary and ubinary; {files[0].path} holds {stated.precision}, of which every "
            "vector is compared with the query's own numbers; leave it out"
        )
    folder, _ = find_model(arguments.model)
    from stage_trainer.files import fingerprint_of

    if not arguments.other_files and (ours := fingerprint_of(folder)) != stated.model:
        raise UserError(
            f"{files[0].path} was made by another model ({stated.model[:12]}; {arguments.model} is {ours[:12]}), so a "
            "search would mean nothing; name that model, or encode again. If both are the same model in different "
            "files (an export and its stage), say --other-files"
        )
    from stage_trainer.bulk.search import search
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.metrics.rescoring import MULTIPLIER

    model = DualEncoder.from_pretrained(folder).eval()
    try:
        queries = model.encode_text(arguments.queries, task=arguments.task, truncate_dim=stated.dims, max_length=512)
    except ValueError as error:
        raise UserError(f"the queries cannot be encoded as {files[0].path} needs them: {error}") from error
    found = search(files, queries, arguments.top_k or TOP_K, arguments.rescore_multiplier or MULTIPLIER)
    for query, hits in zip(arguments.queries, found, strict=True):
        print(query)
        for place, hit in enumerate(hits, 1):
            print(f"{place:4}  {hit.score:6.3f}  {hit.id}")
