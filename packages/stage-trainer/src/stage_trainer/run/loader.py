"""Prefetches batches in worker processes, which end only when this process ends them."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from typing import Any

from data_prep.shards import ShardError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from stage_trainer.data.batches import Drawn
from stage_trainer.errors import UserError
from stage_trainer.run.stop import SIGNALS
from stage_trainer.tasks.task import Batches

_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited)")


def batches(data: Batches, start: int, stop: int, workers: int) -> Generator[tuple[Any, Drawn], None, None]:
    """Batches `start` to `stop` - 1, prefetched by worker processes if there are any.

    A signal that asks the run to stop often reaches the workers, too (a terminal's Ctrl-C, a scheduler's signal): they
    ignore it, since the current step and the checkpoint after it may still need them. They end with this process, or
    when the iterator is closed, which must not be left to the garbage collector.

    Raises:
        UserError: hardly any sample of a source can be read.
    """
    loader = DataLoader(
        _FailuresAsItems(data),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_begin_worker if workers else None,
    )
    before = set(multiprocessing.active_children())
    with _signals_held() if workers else contextlib.nullcontext():  # workers inherit the block, until they ignore them
        items = iter(loader)
    processes = set(multiprocessing.active_children()) - before
    try:
        for item in items:
            if isinstance(item, Exception):
                raise UserError(str(item)) from item
            yield item
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # a worker died while it sent a batch
        for process in processes:
            process.join(1)
            if code := process.exitcode:
                how = f"is killed by signal: {signal.strsignal(-code)}" if code < 0 else "exited"
                raise RuntimeError(f"DataLoader worker (pid {process.pid}) {how}") from error
        raise
    finally:
        del items  # the loader asks its workers to end, and waits some seconds
        for process in processes:
            if process.is_alive():
                # Python waits for its children when it ends. torch raises when it hears that this one is dead.
                with contextlib.suppress(RuntimeError):
                    process.kill()
                    process.join()


@contextlib.contextmanager
def worker_deaths_explained(workers: int) -> Iterator[None]:
    """Explains what may have killed a worker. torch raises that error at any point in this process.

    Raises:
        UserError: a worker is dead, or ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lower = (
            f"lower workers (now {workers}), cache_megabytes or the batch; the same command goes on from the last "
            "checkpoint"
        )
        if isinstance(error, MemoryError):
            raise UserError(f"the machine has no memory left for the next batch; {lower}") from error
        deaths = [death for text in _with_causes(error) if (death := _DIED.search(text))]
        if not deaths:
            raise
        number, by = max(((death[1], death[2]) for death in deaths), key=lambda found: found[1] is not None)
        if by == "Killed":
            reason = "was killed, most likely because the machine, or the job's share of it, ran out of memory"
        elif by == "Bus error":
            reason = "ran out of shared memory (/dev/shm; of a container, --shm-size or --ipc=host)"
        else:
            reason = f"ended by itself ({by or 'no signal'}), perhaps out of memory"
        raise UserError(f"a process that loads data (number {number}) {reason}; {lower}") from error


def _with_causes(error: BaseException | None) -> Iterator[str]:
    """The texts of an error and of its causes; only the first cause names the signal."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _begin_worker(number: int) -> None:
    for asking in SIGNALS:
        signal.signal(asking, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":  # end at once with the parent; elsewhere a worker checks every five seconds
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


class _FailuresAsItems(TorchDataset[Any]):
    """Returns errors that name bad data as items: raised in a worker, they would be buried in a traceback."""

    def __init__(self, data: Batches):
        self.data = data

    def __getitem__(self, step: int) -> Any:
        try:
            return self.data[step]
        except (ShardError, UserError) as error:
            return error
