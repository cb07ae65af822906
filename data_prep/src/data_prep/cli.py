"""The command `data-prep`: its table of contents, and one line on stderr for errors that the user can fix."""

from __future__ import annotations

import argparse
import importlib
import os
import sqlite3
import sys
from collections.abc import Sequence

from data_prep.commands.execution import check_values
from data_prep.errors import UserError
from data_prep.shards import ShardError, escaped_output
from data_prep.shards.terminal import STDOUT

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
        check_values(options)
        status: int = options.run(options)
        sys.stdout.flush()  # here, where it can be said that it does not fit
        return status
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename == STDOUT:  # nor could the interpreter write the rest when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # Whoever opens files to write says their names; without one it is a file that was being read.
        where = error.filename or f"while {getattr(options, 'out', None) or options.command} was made or read"
        print(f"data-prep: {where}: {error.strerror or error}", file=sys.stderr)
        return 2
    except sqlite3.OperationalError as error:
        print(f"data-prep: {options.ledger}: cannot be read or written ({error}); run again", file=sys.stderr)
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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="data-prep", help=argparse.SUPPRESS
    )
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
