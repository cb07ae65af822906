"""`data-prep evalset SET`: evaluation sets, laid out for `stage-trainer evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.commands import Subcommands
from data_prep.commands.import_data import add_source, run_import
from data_prep.sources import EVALSETS


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "evalset",
        help="evaluation sets, laid out for `stage-trainer evaluate`",
        description="Writes OUT/test/image-short/NAME, which `stage-trainer evaluate MODEL OUT` reads. A recipe's "
        "evaluation.pools, which are measured in training, are those of OUT/validation: --split validation.",
    )
    sets = parser.add_subparsers(required=True, metavar="SET", prog="data-prep evalset")
    for name, source in EVALSETS.items():
        one = add_source(sets, name, source, out="folder of the pools")
        one.add_argument(
            "--split",
            choices=("test", "validation"),
            default="test",
            help="of OUT: test for `stage-trainer evaluate`, validation for a recipe's pools (default: %(default)s)",
        )
        one.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    root = Path(options.out)
    receipt = run_import(options, out=str(root / options.split), evalset=True)
    if receipt is not None:
        if receipt["dropped"]:
            print("not the whole set: figures on it cannot be compared with those of others")
        pools = root if options.split == "test" else root / options.split / "image-short"
        print(f"stage-trainer evaluate MODEL {pools}")
    return 0
