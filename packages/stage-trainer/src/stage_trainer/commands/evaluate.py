"""`stage-trainer evaluate`: the figures of a model on held-out data, or on the sets of the paper's tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stage_trainer.commands.any_model import ANY_MODEL, check_any, open_any
from stage_trainer.commands.common import (
    DATA,
    a_path,
    add_max_pixels,
    check_output,
    find_model,
    max_pixels_of,
    say,
)
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from stage_trainer.evaluation.paper import Table
    from stage_trainer.evaluation.suite import Column

OUT = Path("runs/evaluation")
SETS = Path("data")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "evaluate",
        help="figures of a model on held-out data, or the paper's tables",
        description="Measures every data set that DATA holds: of images with captions recall@5 in each direction (of "
        "pages that answer queries nDCG@5, too), of text pairs and triplets nDCG@10, at each Matryoshka dim. What is "
        "found of a stage's folder is also written into it, as evaluation.json, for `stage-trainer report`. With "
        "--suite or --table it measures the sets of the paper's tables instead, by the protocols of its tools, and "
        "prints the tables with the paper's figures beside ours.",
    )
    p.add_argument("model", type=a_path, help=ANY_MODEL + " (the latter with --suite or --table)")
    p.add_argument("data", type=a_path, nargs="?", help=f"{DATA}; of suites the OUT of `data-prep evalset` ({SETS})")
    p.add_argument("--json", type=a_path, help="also write every figure, by language, to this file")
    p.add_argument("--by-language", action="store_true", help="also print text→image (of texts nDCG) by language")
    p.add_argument(
        "--precision",
        metavar="P,…",
        help="also with candidates stored in float16, int8, uint8, binary or ubinary, beside float32 and from the same "
        "embeddings; of bits four times as many as are wanted are rescored",
    )
    add_max_pixels(p)
    group = p.add_argument_group("the paper's tables")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--suite",
        choices=("cross-modal", "text", "documents", "classification", "all"),
        help="the tables of these sets, by model and dim",
    )
    which.add_argument("--table", metavar="N", help="one table, by its number in the paper, or vidore-v2 or -v3")
    group.add_argument(
        "--beside", type=a_path, action="append", default=[], metavar="MODEL", help="a further column; may be repeated"
    )
    group.add_argument(
        "--out", type=a_path, default=OUT, help="folder of figures and tables; what it has is not measured again "
        "(default: %(default)s)"
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a text (default: 512; of other libraries what they say)"
    )
    group.add_argument(
        "--query-task", metavar="TASK", help="whose instruction queries of texts and pages get, retrieval.query for "
        "example (default: none)"
    )  # fmt: skip
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.suite is not None or arguments.table is not None:
        _run_tables(arguments)
        return
    if arguments.beside or arguments.max_length is not None or arguments.query_task:
        raise UserError("--beside, --max-length and --query-task are of the paper's tables; add --suite or --table")
    if arguments.data is None:
        raise UserError(f"name DATA, {DATA}; or --suite or --table for the paper's tables")
    _run_pools(arguments)


def _run_tables(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.sets import find_sets
    from stage_trainer.recipe.limits import MAX_PIXELS

    if arguments.precision is not None:
        raise UserError("--precision is of held-out data; leave out --suite and --table, or it")
    if arguments.by_language:
        raise UserError("--by-language is of pools; the paper's tables have languages of their own")
    if arguments.max_length is not None and arguments.max_length < 2:
        raise UserError(f"--max-length is {arguments.max_length}; expected a whole number from 2")
    if arguments.query_task is not None and not arguments.query_task.strip():
        raise UserError(f"--query-task is {arguments.query_task!r}; name one, or leave it out")
    max_pixels = max_pixels_of(arguments) or MAX_PIXELS
    if arguments.json:
        check_output(arguments.json)
    found = find_sets(arguments.data or SETS)  # before PyTorch is loaded
    models = [arguments.model, *arguments.beside]
    if twice := [str(model) for number, model in enumerate(models) if model in models[:number]]:
        raise UserError(f"{twice[0]} is named twice; a table has one column for each model")
    for model in models:
        check_any(model)
    from stage_trainer.evaluation.models import Asked
    from stage_trainer.evaluation.suite import asked_tables, measure
    from stage_trainer.files import check_can_write

    tables = asked_tables(arguments.suite, arguments.table, found)
    names = list(dict.fromkeys(name for table in tables for name in table.sets()))
    if not found.keys() & set(names):
        wanted = ", ".join(names[:6]) + (", …" if len(names) > 6 else "") or "of labelled images"
        raise UserError(
            f"{arguments.data or SETS} has none of the sets measured here ({wanted}); it has "
            f"{', '.join(found) or 'no evaluation set'}. `data-prep evalset` makes them"
        )
    check_can_write(arguments.out / "figures.json")
    asked = Asked(arguments.max_length, arguments.query_task, max_pixels=max_pixels)
    columns = []
    for path in models:
        columns.append(measure(open_any(path, asked), names, found, arguments.out, say, max_pixels))
        if not columns[-1].sets:
            raise UserError("; ".join(f"{name}: {why}" for name, why in columns[-1].gaps.items()))
    _write_tables(arguments, tables, columns)


def _write_tables(arguments: argparse.Namespace, tables: list[Table], columns: list[Column]) -> None:
    from stage_trainer.evaluation.paper_tables import as_csv, as_json, as_text, settings_of
    from stage_trainer.files import write_whole

    shown = [table for table in tables if any(name in column.sets for column in columns for name in table.sets())]
    text = "\n\n".join([*(as_text(table, columns) for table in shown), "measured with\n" + settings_of(columns)])
    print(text)
    if unseen := [table.name for table in tables if table not in shown]:
        print(f"\nnot measured, for want of data: {', '.join(unseen)}")
    figures = json.dumps(as_json(shown, columns), indent=1, ensure_ascii=False) + "\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out / "tables.txt", text + "\n")
    for table in shown:
        write_whole(
            arguments.out / f"{f'table-{table.name}' if table.name.isdigit() else table.name}.csv",
            as_csv(table, columns),
        )
    for path in [arguments.out / "figures.json", *([arguments.json] if arguments.json else [])]:
        write_whole(path, figures)
    print(f"\nevery figure: {arguments.out / 'figures.json'}; the tables also as {arguments.out}/*.csv")


def _run_pools(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.held_out import find

    max_pixels, precisions = max_pixels_of(arguments), _precisions(arguments.precision)
    if arguments.json:
        check_output(arguments.json)
    find(arguments.data)  # before PyTorch is loaded
    model, checkpoint = find_model(arguments.model)
    from stage_trainer.evaluation.evaluate import evaluate
    from stage_trainer.evaluation.report import EVALUATION
    from stage_trainer.evaluation.retrieval import DIRECTIONS
    from stage_trainer.evaluation.tables import languages_table, precision_table, table
    from stage_trainer.files import write_whole

    # The figures of a stage are written into its folder, where `report` looks for them.
    of_stage = [arguments.model / EVALUATION] if checkpoint and checkpoint.parent == arguments.model else []
    for path in of_stage:
        check_output(path)
    pools = evaluate(model, arguments.data, say, max_pixels=max_pixels, precisions=precisions)
    if checkpoint:
        pools = {name: {**figures, "checkpoint": checkpoint.name} for name, figures in pools.items()}
    print(table(pools))
    if precisions:
        print("\n" + precision_table(pools))
    if arguments.by_language:
        print("\n" + languages_table(pools, DIRECTIONS[0]))
    wanted = [arguments.json] if arguments.json else []
    for path in dict.fromkeys([*of_stage, *wanted]):
        write_whole(path, json.dumps(pools, indent=1, ensure_ascii=False) + "\n")
        print(f"\nevery figure, by language: {path}")


def _precisions(asked: str | None) -> list[str]:
    """Of --precision.

    Raises:
        UserError: one that there is not, that is there anyway, or that is named twice.
    """
    from stage_trainer.metrics.quantization import PRECISIONS

    names = [] if asked is None else [name.strip() for name in asked.split(",")]
    for number, name in enumerate(names):
        if name not in PRECISIONS[1:]:
            raise UserError(f"--precision has {name!r}; expected {', '.join(PRECISIONS[1:])}, beside float32")
        if name in names[:number]:
            raise UserError(f"--precision names {name} twice")
    return names
