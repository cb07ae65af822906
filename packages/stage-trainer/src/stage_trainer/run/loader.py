"""Prefetches batches in worker processes, which end only when this process ends them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

from data_prep.shards import ShardError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from stage_trainer.data.drawn import Drawn
from stage_trainer.data.pieces import BatchesInPieces, Whole
from stage_trainer.errors import UserError
from stage_trainer.run.shared_memory import pieces_ahead
from stage_trainer.run.shortages import (
    NO_FILES,
    NO_SHARED_MEMORY,
    no_files,
    no_shared_memory,
    shortage,
    shortages_explained,
)
from stage_trainer.run.stop import SIGNALS
from stage_trainer.tasks.task import Batches

_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited)")
WORKER_STARTS = 2
"""So often worker processes are started in a row of steps: once, and once more if one dies or is stuck. A batch is a
function of its number, so the new ones go on where the old ones were."""
_STUCK = "stuck after"


def batches(
    data: Batches,
    start: int,
    stop: int,
    workers: int,
    *,
    limit: float = math.inf,
    say: Callable[[str], None] = print,
) -> Generator[tuple[Any, Drawn], None, None]:
    """Batches `start` to `stop` - 1, prefetched by worker processes if there are any.

    A signal that asks the run to stop often reaches the workers, too (a terminal's Ctrl-C, a scheduler's signal): they
    ignore it, since the current step and the checkpoint after it may still need them. They end with this process, or
    when the iterator is closed, which must not be left to the garbage collector.

    Args:
        limit: seconds after which workers that bring no batch are taken for stuck (`limits.batch`).
        say: shows a line when workers are started again, and when shared memory is short.

    Raises:
        UserError: hardly any sample of a source can be read; shared memory or file descriptors ran out.
        RuntimeError: a worker died, which `worker_deaths_explained` explains.
    """
    parts: BatchesInPieces[Any] = data if isinstance(data, BatchesInPieces) else Whole(data)
    ahead = pieces_ahead(parts, stop - 1, workers, say) if workers and start < stop else 0
    for starts_left in reversed(range(WORKER_STARTS)):
        try:
            for item in _of_one_start(parts, start, stop, workers, ahead, limit):
                start += 1
                yield item
            return
        except _WorkersLost as error:
            if not starts_left:
                raise RuntimeError(str(error)) from error
            say(f"{_explained(str(error))}; the workers are started again, once, from step {start}")


class _WorkersLost(Exception):
    """A worker is dead; the text has torch's form."""


def _of_one_start(
    data: BatchesInPieces[Any], start: int, stop: int, workers: int, ahead: int, limit: float
) -> Iterator[tuple[Any, Drawn]]:
    """Batches from workers that are started once."""
    loader = DataLoader(
        _FailuresAsItems(data),
        batch_size=None,
        sampler=((step, number) for step in range(start, stop) for number in range(data.pieces(step))),
        num_workers=workers,
        prefetch_factor=ahead or None,
        worker_init_fn=_begin_worker if workers else None,
    )
    before, heard = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    with _signals_held() if workers else contextlib.nullcontext():  # workers inherit the block, until they ignore them
        items = iter(loader)
    processes = set(multiprocessing.active_children()) - before
    if processes and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, heard or signal.SIG_DFL)  # torch's handler would raise in the middle of a step
    try:
        for step in range(start, stop):
            with _killed_after(limit, processes), shortages_explained():
                batch = data.joined(step, _received(items, data.pieces(step)))
            yield batch
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:  # the last: while it sent a batch
        if (lost := _lost(processes, error)) is None:
            raise
        try:
            raise lost from error
        finally:
            del lost  # else the loader would live on in a cycle of references, and new workers would inherit it
    finally:
        for process in processes:
            if process.exitcode is None and any(other.exitcode is not None for other in processes):
                process.kill()  # torch would wait for it
        del items  # the loader asks its workers to end, and waits some seconds
        for process in processes:
            if process.is_alive():
                # Python waits for its children when it ends. torch raises when it hears that this one is dead.
                with contextlib.suppress(RuntimeError):
                    process.kill()
                    process.join()


def _received(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The next pieces; UserError in place of one that could not be made."""
    for _ in range(count):
        item = next(items)
        if isinstance(item, Exception):
            raise UserError(str(item)) from item
        yield item


@contextlib.contextmanager
def _killed_after(limit: float, processes: set[Any]) -> Iterator[None]:
    """Kills workers that are stuck (or stopped): the loader then hears that they are dead."""
    if not processes or limit == math.inf:
        yield
        return

    def kill() -> None:
        for process in processes:
            process.stuck = limit
            process.kill()

    timer = threading.Timer(min(limit, threading.TIMEOUT_MAX), kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _lost(processes: set[Any], error: Exception) -> _WorkersLost | None:
    """Which worker is dead, in torch's words; None if it is another error.

    Raises:
        UserError: its end has a cause that does not go away.
    """
    if not isinstance(error, RuntimeError) or _DIED.search(str(error)):
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
        for process in processes:
            process.join(1 if process.sentinel in ended else 0)
    # The one that died by itself, before those that were killed because of it.
    for process in sorted(processes, key=lambda process: (process.exitcode == -signal.SIGKILL, process.pid)):
        if code := process.exitcode:
            if code == NO_SHARED_MEMORY:
                raise UserError(no_shared_memory()) from error
            if code == NO_FILES:
                raise UserError(no_files()) from error
            if limit := getattr(process, "stuck", None):
                how = f"is killed by signal: {_STUCK} {limit:.0f} seconds"
            else:
                how = f"is killed by signal: {signal.strsignal(-code)}" if code < 0 else "exited"
            return _WorkersLost(f"DataLoader worker (pid {process.pid}) {how}")
    return None


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
        if not (reason := _explained(*_with_causes(error))):
            raise
        raise UserError(f"{reason}; {lower}") from error


def _explained(*texts: str) -> str | None:
    """What the best informed of torch's messages on a worker's end means; None if there is none among them."""
    deaths = [death for text in texts if (death := _DIED.search(text))]
    if not deaths:
        return None
    number, by = max(((death[1], death[2]) for death in deaths), key=lambda found: found[1] is not None)
    if by == "Killed":
        reason = "was killed, most likely because the machine, or the job's share of it, ran out of memory"
    elif by is not None and by.startswith(_STUCK):
        seconds = by.removeprefix(_STUCK)
        reason = f"brought no batch in{seconds} and is stuck or stopped; if it only took long, raise limits.batch"
    elif by == "Bus error":
        reason = (
            "ran out of shared memory (/dev/shm; of a container, --shm-size or --ipc=host), or a file of its data was "
            "cut short while it was read"
        )
    else:
        reason = f"ended by itself ({by or 'no signal'}), perhaps out of memory"
    return f"a process that loads data (number {number}) {reason}"


def _with_causes(error: BaseException | None) -> Iterator[str]:
    """The texts of an error and of its causes; only the first cause names the signal."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _undelivered(error: Exception, item: Any) -> None:
    """In a worker's thread, which would print the error and drop the batch, for which the run would wait for ever."""
    if (code := shortage(error)) is None:
        traceback.print_exception(error)
    os._exit(code or 1)


def _begin_worker(number: int) -> None:
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_undelivered)  # type: ignore[attr-defined]
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
    """Pieces by step and number. Errors that name bad data are items, too: raised in a worker, they would be buried in
    a traceback."""

    def __init__(self, data: BatchesInPieces[Any]):
        self.data = data

    def __getitem__(self, place: tuple[int, int]) -> Any:
        try:
            return self.data.piece(*place)
        except (ShardError, UserError) as error:
            return error
        except OSError as error:
            if shortage(error) != NO_FILES:
                raise
            return UserError(no_files())
