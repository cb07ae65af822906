"""`data-prep inspect`: an HTML report on data sets."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands


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
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from data_prep.errors import UserError
    from data_prep.execute.progress import Progress
    from data_prep.inspection.find import find_datasets
    from data_prep.inspection.report import html_report
    from data_prep.inspection.summary import sampled, summarize
    from data_prep.shards import Dataset
    from data_prep.shards.files import write_file, writing

    if options.look_at < 1 or options.examples < 0:
        raise UserError(f"--look-at {options.look_at}, --examples {options.examples}: expected 1 and 0 or more")
    directories = find_datasets(options.shards)
    sizes = [len(Dataset.open(directory)) for directory in directories]
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
