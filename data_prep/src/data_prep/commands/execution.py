"""What commands share: the options of long ones, and the way from options to the objects that they describe."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.errors import UserError
from data_prep.shards.format import SHARD_SAMPLES

if TYPE_CHECKING:
    from data_prep.execute import Execution, Target

_Described = TypeVar("_Described")


def check_values(options: argparse.Namespace) -> None:
    """Refuse what no option can mean, whatever its command: nan, numbers without an end, empty texts, NUL.

    An empty text is often a shell's variable that is not set; where none is the default, it would stand for the current
    folder, or for the default of something else.
    """
    source = getattr(options, "source", None)
    fields = dataclasses.fields(source) if isinstance(source, type) else ()  # `captions export` has a --source, too
    empty = {field.name for field in fields if field.default == ""}
    for name, given in vars(options).items():
        for value in given if isinstance(given, list) else [given]:
            what = f"{name.replace('_', '-')} {value!r}"
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{what}: expected a finite number")
            if isinstance(value, int) and abs(value) >= 2**53:
                raise UserError(f"{what}: expected a number below 2^53")
            if isinstance(value, str) and ("\0" in value or not (value.strip() or name in empty)):
                raise UserError(
                    f"{what}: {'holds NUL' if value.strip() else 'is empty'}; give a text, or leave the option out"
                )


def add_execution(parser: argparse.ArgumentParser, *, cuts: bool = True) -> None:
    """Add --engine, --workers, --task and, if the command cuts its output into shards, --samples-per-shard."""
    group = parser.add_argument_group(
        "execution", "None of these changes a sample. To resume, run the same command again."
    )
    group.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="processes on this machine (default), or Ray tasks: on the cluster of RAY_ADDRESS or a local one",
    )
    group.add_argument("--workers", type=int, metavar="N", help="units at a time (default: one a core)")
    group.add_argument(
        "--task",
        default="0/1",
        metavar="I/N",
        help="do a share of the units, as task I of N (from 0) of a Slurm array; the last one publishes",
    )
    if cuts:
        add_samples_per_shard(group)


def add_samples_per_shard(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --samples-per-shard."""
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=SHARD_SAMPLES,
        metavar="N",
        help="samples in a tar at most; at 1 GB a new one is begun, too (default: %(default)s)",
    )


def made(described: type[_Described], options: argparse.Namespace, **values: Any) -> _Described:
    """An instance of a dataclass: its fields are the options of the same names, or `values`."""
    fields = {field.name for field in dataclasses.fields(described)} - values.keys()  # type: ignore[arg-type]
    values |= {name: getattr(options, name) for name in fields}
    return described(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def add_datasets(parser: argparse.ArgumentParser, *, shards: str = "data sets") -> None:
    """Add SHARDS, --out and --name of a command that makes a data set of others, and the options of long commands."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help=shards)
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the data sets, data/train for example")
    parser.add_argument("--name", required=True, help="name of the new data set")
    add_execution(parser)


def execution_of(options: argparse.Namespace) -> Execution:
    """How to run the job, by the options. UserError if they make no sense."""
    from data_prep.execute import Execution

    task, _, tasks = options.task.partition("/")
    try:
        return Execution(options.engine, options.workers, (int(task), int(tasks)))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--task {options.task}: expected I/N, for example 0/4") from error


def target_of(options: argparse.Namespace, out: str | None = None) -> Target:
    """Where the user wants the data sets. UserError if a shard would hold nothing."""
    from data_prep.execute import Target

    if options.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {options.samples_per_shard}: expected at least 1")
    return Target(out or options.out, options.name, options.samples_per_shard)
