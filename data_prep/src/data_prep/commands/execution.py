"""The options of every long command: the engine, the workers, the size of shards."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.execute import Execution, Target


def add_execution(parser: argparse.ArgumentParser, *, samples_per_shard: int = 1000, cuts: bool = True) -> None:
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
    if not cuts:
        return
    group.add_argument(
        "--samples-per-shard",
        type=int,
        default=samples_per_shard,
        metavar="N",
        help="samples in a tar at most (default: %(default)s)",
    )


def execution_of(options: argparse.Namespace) -> Execution:
    """How to run the job, by the options. UserError if they make no sense."""
    from data_prep.errors import UserError
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
    from data_prep.errors import UserError
    from data_prep.execute import Target

    if options.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {options.samples_per_shard}: expected at least 1")
    return Target(out or options.out, options.name, options.samples_per_shard)
