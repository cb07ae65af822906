"""Runs units in processes on this machine or in Ray tasks on a cluster, with the same bytes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from data_prep.errors import UserError, needs
from data_prep.execute.unit import Receipt, Spec, process_shard
from data_prep.shards.format import JsonObject

ENGINES = ("processes", "ray")
_WAITING = 2  # units queued for each worker; more would only take memory


def run_units(specs: Sequence[Spec], *, engine: str, workers: int) -> Iterator[Receipt]:
    """Run the units and yield their receipts as they finish, in no fixed order.

    Args:
        engine: one of `ENGINES`. workers: units at a time; with Ray, cores of the local cluster that is started if
            `RAY_ADDRESS` names none.

    Raises:
        UserError, ShardError: of a unit, or because a worker died; the other units are stopped.
    """
    if not specs:  # all are done already
        return
    if engine == "ray":
        yield from _with_ray(specs, workers)
    elif workers == 1 or len(specs) == 1:
        for spec in specs:
            yield process_shard(spec)
    else:
        yield from _with_processes(specs, min(workers, len(specs)))


def _with_processes(specs: Sequence[Spec], workers: int) -> Iterator[Receipt]:
    left = iter(specs)
    running: set[Future[Receipt]] = set()
    with worker_pool(workers) as submit:
        while True:
            while len(running) < _WAITING * workers and (spec := next(left, None)) is not None:
                running.add(submit(process_shard, spec))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., Future[Any]]]:
    """Processes that end with this one, however it ends; yields the `submit` of an executor.

    Raises:
        UserError: the system refuses to start them, or one of them died; the others are stopped.
    """
    before = set(multiprocessing.active_children())
    # Spawned, not forked: libraries that the work loads start threads.
    context = multiprocessing.get_context("spawn")
    with _refusals_explained():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with _refusals_explained():  # an executor starts its processes when they are needed
            return pool.submit(function, *arguments)

    try:
        yield submit
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, as if it was killed (out of memory?); run the same command again, with fewer "
            "--workers if memory is short"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()  # after an error or Ctrl-C; an unfinished unit has no receipt
        pool.shutdown(cancel_futures=True)


@contextmanager
def _refusals_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"worker processes cannot be started ({error.strerror}): they need some kilobytes of /dev/shm, memory and "
            "open files (`ulimit -n`); raise what is short, or take --workers 1"
        ) from error


def _begin_worker() -> None:
    """Make the worker exit at once and quietly when its parent ends, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _process_shard_from(folder: str, spec: Spec) -> Receipt:
    """Run a unit on a cluster node, where processes start in another folder: paths in `spec` start from `folder`."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: not to be found on {socket.gethostname()} ({error.strerror}); all machines of the cluster must "
            f"see the folder in which the command was started, and the data, under the same names"
        ) from error
    return process_shard(spec)


def _with_ray(specs: Sequence[Spec], workers: int) -> Iterator[Receipt]:
    ray = needs("ray", extra="ray", what="--engine ray")
    ours = not ray.is_initialized()
    if ours:
        local: JsonObject = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        for attempts_left in (2, 1, 0):
            try:
                ray.init(**local, include_dashboard=False, log_to_driver=False, configure_logging=False)
                break
            except Exception as error:  # Ray raises bare exceptions when it cannot start or reach a cluster
                ray.shutdown()
                # Ray waits thirty seconds for itself; no setting changes that, and a busy machine may need longer.
                if not attempts_left or "timed out during startup" not in str(error):
                    raise UserError(f"Ray cannot be started or reached ({error}); use --engine processes") from error
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(_process_shard_from)
        left = iter(specs)
        running: list[Any] = []
        window = _WAITING * max(workers, int(ray.cluster_resources().get("CPU", 1)))
        while True:
            while len(running) < window and (spec := next(left, None)) is not None:
                running.append(task.remote(os.getcwd(), spec))
            if not running:
                break
            done, running = ray.wait(running)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
    finally:
        if ours:
            ray.shutdown()
