"""`data-prep negatives`: text pairs to triplets with hard negatives."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands
from data_prep.commands.execution import add_datasets, execution_of, made, target_of


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "negatives",
        help="text pairs to triplets with hard negatives",
        description="Writes OUT/text-triplets/NAME: each pair of SHARDS with the answers of other pairs that MODEL "
        "finds nearest to its query, except those that are right, or nearly so. Pairs with too few are dropped.",
    )
    add_datasets(parser, shards="data sets of text pairs")
    parser.add_argument("--model", required=True, metavar="DIR", help="a text tower, or a model of ours with its text/")
    parser.add_argument("--count", type=int, default=7, metavar="N", help="negatives for each query (default: 7)")
    parser.add_argument(
        "--ranks",
        nargs=2,
        type=int,
        default=[10, 200],
        metavar=("FROM", "TO"),
        help="among the neighbours that are no known answers; the first are often right (default: 10 200)",
    )
    parser.add_argument(
        "--margin", type=float, default=0.05, metavar="X", help="below the answer's own similarity (default: 0.05)"
    )
    parser.add_argument(
        "--similarity", type=float, default=0.8, metavar="X", help="of texts that count as the same (default: 0.8)"
    )
    parser.add_argument("--query-task", metavar="NAME", help="the tower's task for queries (retrieval.query)")
    parser.add_argument("--target-task", metavar="NAME", help="the tower's task for answers (retrieval.passage)")
    parser.add_argument("--dim", type=int, metavar="N", help="search by the first N dims only")
    parser.add_argument(
        "--exact-up-to", type=int, default=200_000, metavar="N", help="pairs; more: inverted lists (default: 200000)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from data_prep.negatives import Embedding, Guards, mine_negatives

    mine_negatives(
        options.shards,
        target_of(options),
        made(Embedding, options),
        guards=made(Guards, options),
        similarity=options.similarity,
        exact_up_to=options.exact_up_to,
        execution=execution_of(options),
    )
    return 0
