"""`data-prep corpus`: build the laptop corpus."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands
from data_prep.commands.execution import made


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "corpus",
        help="build the laptop corpus",
        description="Builds the laptop corpus in OUT: emoji, stamps, flags, package descriptions and help pages in "
        "thirty languages, from Debian packages that apt fetches into a cache (260 MB, once; no root, nothing on the "
        "system is changed). If OUT holds the same corpus already, nothing is done.",
    )
    parser.add_argument("out", metavar="OUT", help="folder to build; must not exist, or hold this very corpus")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--packages", metavar="DIR", help="take .deb files (and Translation-xx lists) from this folder, fetch nothing"
    )
    where.add_argument(
        "--drawn",
        nargs="?",
        type=int,
        const=600,
        metavar="N",
        help="make N drawn pictures (600 if no number is given) instead of the real corpus: no packages, no network",
    )
    parser.add_argument("--cache", metavar="DIR", help="where fetched packages are kept (default: ~/.cache/trilith)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and every choice (default: 0)")
    parser.add_argument(
        "--image-size", type=int, default=80, metavar="PIXELS", help="side of the stored pictures (default: 80)"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="pieces of the tokenizer (default: 16384; 384 for --drawn)"
    )
    parser.add_argument(
        "--max-packages", type=int, default=25_000, metavar="N", help="package descriptions at most (default: 25000)"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=("stamps", "flags", "packages", "help"),
        help="leave a source out; can be given several times",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads (default: one a core); the result is the same for any number"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from data_prep.corpus import Settings, build_corpus

    build_corpus(
        options.out,
        made(Settings, options, without=sorted(set(options.without))),
        packages=options.packages,
        cache=options.cache,
        workers=options.workers,
        log=lambda line: print(line, flush=True),
    )
    return 0
