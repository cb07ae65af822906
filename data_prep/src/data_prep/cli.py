"""The command `data-prep`: its table of contents, and one line on stderr for errors that the user can fix."""

from __future__ import annotations

import argparse
import importlib
import sqlite3
import sys
from collections.abc import Sequence

from data_prep.errors import UserError
from data_prep.shards import ShardError, escaped_output

# What `--help` prints, in this order: a heading, and the modules of `data_prep.commands` below it.
CONTENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("public data to shards", ("import_data",)),
    ("better data", ("curation", "captions")),
    ("inspecting data", ("inspection",)),
    ("a laptop corpus that downloads no data sets", ("corpus",)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit status 0, or 2 with one line on stderr for an error that the user can fix."""
    options = _parser().parse_args(arguments)
    with escaped_output():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"data-prep: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
    except sqlite3.DatabaseError as error:  # a damaged page shows only when something reads it
        print(f"data-prep: {options.ledger} is damaged ({error}); restore it from a copy", file=sys.stderr)
        return 2
    except (UserError, ShardError) as error:
        print(f"data-prep: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-prep",
        usage="data-prep COMMAND …",
        description="Turns public data into the shards that the trainer reads. `data-prep COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="data-prep", help=argparse.SUPPRESS)
    contents = []
    for heading, modules in CONTENTS:
        before = len(commands._choices_actions)
        for module in modules:
            importlib.import_module(f"data_prep.commands.{module}").add(commands)
        contents.append(f"{heading}:")
        contents += [f"  {choice.dest:<12}{choice.help}" for choice in commands._choices_actions[before:]]
        contents.append("")
    parser.epilog = "\n".join(contents)
    return parser
