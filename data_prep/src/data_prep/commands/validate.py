"""`data-prep validate`: check every byte of data sets."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_prep.commands import Subcommands


def add(commands: Subcommands) -> None:
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
    from data_prep.errors import UserError
    from data_prep.execute.progress import Progress
    from data_prep.inspection.find import find_datasets
    from data_prep.inspection.validate import validate
    from data_prep.shards import Dataset, ShardError

    def shards(directory: Path) -> int:
        try:
            return len(Dataset.open(directory).shard_sizes)
        except ShardError:
            return 0  # `validate` reports the fault

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected at least 1")
    directories = find_datasets(options.shards)
    progress = Progress(max(1, sum(map(shards, directories))))
    workers = options.workers or os.cpu_count() or 1
    wrong = 0
    for directory in directories:
        count = 0
        for problem in validate(directory, workers=workers, decode=not options.no_decode, tick=progress.add):
            count += 1
            if count <= options.show:
                progress.clear()
                print(problem, file=sys.stderr)
        progress.clear()
        if count > options.show:
            print(f"{directory}: {count - options.show} further problems (--show)", file=sys.stderr)
        print(f"{directory}: {f'{count} problems' if count else f'{len(Dataset.open(directory))} samples, all sound'}")
        wrong += count > 0
    progress.finish()
    return 1 if wrong else 0
