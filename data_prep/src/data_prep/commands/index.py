"""`data-prep index`: sidecars for existing shards."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands
from data_prep.commands.execution import add_execution, execution_of


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "index",
        help="use existing webdataset tars as they are, with sidecars",
        description="Makes the data set OUT/KIND/NAME of links to webdataset tars and a sidecar for each: where every "
        "sample lies, and its hash. The tars are neither copied nor changed; they must stay where they are.",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="uncompressed tars, or folders of them")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the data sets")
    parser.add_argument("--name", default="indexed", help="name of the data set (default: %(default)s)")
    parser.add_argument(
        "--kind",
        choices=("image-short", "image-long", "text-pairs", "text-triplets"),
        default="image-short",
        help="what the tars hold (default: %(default)s)",
    )
    add_execution(parser, cuts=False)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from data_prep.sources.indexing import index_shards

    index_shards(
        options.shards,
        options.out,
        name=options.name,
        kind=options.kind,
        execution=execution_of(options),
        log=lambda line: print(line, flush=True),
    )
    return 0
