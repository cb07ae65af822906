"""`data-prep validate`: check data sets to the last byte."""

from __future__ import annotations

import argparse
import os
import sys


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "validate",
        help="check data sets: manifest, checksums, hashes, keys, texts, images",
        description="Reads every byte of the data sets below the folders. Exit status 1 if something is wrong.",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="data sets, or folders of them")
    parser.add_argument("--no-decode", action="store_true", help="do not decode the images, which takes the longest")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="problems a data set (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from ..looking.find import find_datasets
    from ..looking.validate import validate
    from ..shards import Dataset

    wrong = 0
    for directory in find_datasets(options.shards):
        count = 0
        workers = options.workers or os.cpu_count() or 1
        for problem in validate(directory, workers=workers, decode=not options.no_decode):
            count += 1
            if count <= options.show:
                print(problem, file=sys.stderr)
        if count > options.show:
            print(f"{directory}: {count - options.show} further problems (--show)", file=sys.stderr)
        print(f"{directory}: {f'{count} problems' if count else f'{len(Dataset.open(directory))} samples, all sound'}")
        wrong += count > 0
    return 1 if wrong else 0
