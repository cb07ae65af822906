"""`data-prep inspect` and `validate`: look at data sets, and check every byte of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from data_prep.commands import Subcommands
from data_prep.errors import UserError
from data_prep.shards import Dataset, ShardError
from data_prep.shards.files import write_file, writing
from data_prep.shards.format import MANIFEST


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="an HTML report: counts, lengths, images, duplicates",
        description="Writes one self-contained HTML page: counts by source and language, lengths, image sizes, images "
        "and texts in each language, duplicates, and what was dropped for which reason.",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="data sets, or folders of them")
    parser.add_argument("--out", default="inspect.html", metavar="FILE", help="the page (default: %(default)s)")
    parser.add_argument(
        "--look-at",
        type=int,
        default=5000,
        metavar="N",
        help="samples to read of each data set, evenly spaced (default: %(default)s)",
    )
    parser.add_argument("--examples", type=int, default=4, metavar="N", help="a language (default: %(default)s)")
    parser.set_defaults(run=_inspect)

    parser = commands.add_parser(
        "validate",
        help="check data sets: manifest, checksums, hashes, keys, texts, images",
        description="Reads every byte of the data sets below the folders. Exit status 1 if something is wrong.",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="data sets, or folders of them")
    parser.add_argument("--no-decode", action="store_true", help="do not decode the images, which takes the longest")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="problems a data set (default: %(default)s)")
    parser.set_defaults(run=_validate)


def _inspect(options: argparse.Namespace) -> int:
    from data_prep.execute.progress import Progress
    from data_prep.inspection.report import html_report
    from data_prep.inspection.summary import sampled, summarize

    if options.look_at < 1 or options.examples < 0:
        raise UserError(f"--look-at {options.look_at}, --examples {options.examples}: expected 1 and 0 or more")
    directories = _find_datasets(options.shards)
    sizes = [len(Dataset.open(directory, check=False)) for directory in directories]
    progress = Progress(max(1, sum(size + len(sampled(size, options.look_at)) for size in sizes)))
    findings = [
        summarize(path, look_at=options.look_at, examples=options.examples, tick=lambda: progress.add(1))
        for path in directories
    ]
    progress.finish()
    out = Path(options.out)
    with writing(out):
        write_file(out, html_report(findings, title=", ".join(options.shards)).encode("utf-8", errors="replace"))
    print(f"wrote {out}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from data_prep.execute.progress import Progress
    from data_prep.inspection.validate import validate

    def shards(directory: Path) -> int:
        try:
            return len(Dataset.open(directory).shards)
        except ShardError:
            return 0  # `validate` reports the fault

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected at least 1")
    if options.show < 0:
        raise UserError(f"--show {options.show}: expected 0 or more")
    directories = _find_datasets(options.shards)
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
        sound = f"{len(Dataset.open(directory, check=False))} samples, all sound" if not count else ""
        print(f"{directory}: {sound or f'{count} problems'}")
        wrong += count > 0
    progress.finish()
    return 1 if wrong else 0


def _find_datasets(paths: Iterable[str]) -> list[Path]:
    """The given data sets, and all data sets below the given folders, in order. UserError if a folder holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        below = sorted(
            manifest.parent
            for manifest in path.rglob(MANIFEST)
            if not any(part.endswith(".partial") for part in manifest.relative_to(path).parts)
        )
        if not below:
            raise UserError(
                f"{path}: holds no data set (no {MANIFEST} in it or below); `data-prep index` makes one of other tars"
            )
        found += below
    return list(dict.fromkeys(found))
