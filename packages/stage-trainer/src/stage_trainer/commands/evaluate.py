"""`stage-trainer evaluate`: the figures of a model on held-out data."""

from __future__ import annotations

import argparse
import json

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


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "evaluate",
        help="figures of a model on held-out data: recall@5 of images and captions, nDCG of text pairs",
        description="Measures every data set that DATA holds: of images with captions recall@5 in each direction (of "
        "pages that answer queries nDCG@5, too), of text pairs and triplets nDCG@10, at each Matryoshka dim. What is "
        "found of a stage's folder is also written into it, as evaluation.json, for `stage-trainer report`.",
    )
    p.add_argument("model", type=a_path, help=MODEL)
    p.add_argument("data", type=a_path, help=DATA)
    p.add_argument("--json", type=a_path, help="also write every figure, by language, to this file")
    p.add_argument("--by-language", action="store_true", help="also print text→image (of texts nDCG) by language")
    add_max_pixels(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.held_out import find

    max_pixels = max_pixels_of(arguments)
    if arguments.json:
        check_output(arguments.json)
    find(arguments.data)  # before PyTorch is loaded
    model, checkpoint = find_model(arguments.model)
    from stage_trainer.evaluation.evaluate import evaluate
    from stage_trainer.evaluation.report import EVALUATION
    from stage_trainer.evaluation.retrieval import DIRECTIONS
    from stage_trainer.evaluation.tables import languages_table, table
    from stage_trainer.files import write_whole

    # The figures of a stage are written into its folder, where `report` looks for them.
    of_stage = [arguments.model / EVALUATION] if checkpoint and checkpoint.parent == arguments.model else []
    for path in of_stage:
        check_output(path)
    pools = evaluate(model, arguments.data, say, max_pixels=max_pixels)
    if checkpoint:
        pools = {name: {**figures, "checkpoint": checkpoint.name} for name, figures in pools.items()}
    print(table(pools))
    if arguments.by_language:
        print("\n" + languages_table(pools, DIRECTIONS[0]))
    wanted = [arguments.json] if arguments.json else []
    for path in dict.fromkeys([*of_stage, *wanted]):
        write_whole(path, json.dumps(pools, indent=1, ensure_ascii=False) + "\n")
        print(f"\nevery figure, by language: {path}")
