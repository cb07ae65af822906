"""Processes that encode parts: one a GPU, or several on the CPU. One alone is this process itself."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from stage_trainer.bulk.encoder import Encoder, EncoderSettings
from stage_trainer.bulk.entries import Entry
from stage_trainer.bulk.parts import LeftOut, Part, Parts
from stage_trainer.errors import UserError, is_user_error


class Task(NamedTuple):
    """A part to encode: the place of its first entry among all, its name, its entries."""

    start: int
    name: str
    entries: list[Entry]


class Done(NamedTuple):
    """What came of a task; `refused` is the first entry that cannot be encoded, where such entries are not skipped, and
    then there is no part."""

    task: Task
    refused: LeftOut | None


def encode_all(
    tasks: Iterable[Task], settings: EncoderSettings, parts: Parts, devices: list[str], *, skipping: bool
) -> Iterator[Done]:
    """Encodes and stores every task's part, on as many processes as there are devices; in any order.

    Raises:
        UserError: what a process says, or that it was killed.
    """
    if len(devices) == 1:
        encoder = Encoder(settings, devices[0])
        for task in tasks:
            yield Done(task, _finish(encoder.part(task.entries), task.name, parts, skipping))
        return
    with _started(devices, lambda pipe, device: (pipe, settings, parts, device, skipping, len(devices))) as all_:
        yield from _dealt(iter(tasks), all_)


def _finish(part: Part, name: str, parts: Parts, skipping: bool) -> LeftOut | None:
    if part.left_out and not skipping:
        return part.left_out[0]
    parts.write(name, part)
    return None


class _Process(NamedTuple):
    pipe: Connection
    process: BaseProcess


@contextmanager
def _started(devices: list[str], arguments: Callable[[Connection, str], tuple[Any, ...]]) -> Iterator[list[_Process]]:
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    found: list[_Process] = []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=arguments(theirs, device), daemon=True)
            process.start()
            theirs.close()  # so that its end is noticed here
            found.append(_Process(ours, process))
        yield found
    finally:
        for each in found:
            each.pipe.close()
            each.process.terminate()  # in the middle of a part, perhaps, which is then not there
        for each in found:
            each.process.join()


def _dealt(tasks: Iterator[Task], processes: list[_Process]) -> Iterator[Done]:
    """Gives each process a task, and the next one when it is done."""
    busy: dict[Connection, tuple[_Process, Task]] = {}

    def give(process: _Process) -> None:
        if (task := next(tasks, None)) is not None:
            with _its_end_explained(process):
                process.pipe.send(task.name)
                process.pipe.send(task.entries)
            busy[process.pipe] = process, task

    for process in processes:
        give(process)
    while busy:
        for pipe in multiprocessing.connection.wait(list(busy)):
            assert isinstance(pipe, Connection)
            process, task = busy.pop(pipe)
            with _its_end_explained(process):
                answer = pipe.recv()
            if isinstance(answer, str):
                raise UserError(answer)
            yield Done(task, answer)
            give(process)


@contextmanager
def _its_end_explained(each: _Process) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        each.process.join()
        code = each.process.exitcode or 0
        how = f"ended with exit code {code}; its own message is above"
        if code < 0:
            how = f"was killed by signal {-code}; if the memory is full, take fewer --processes"
        raise UserError(f"a process that encodes {how}. What is done stays: run the same command again") from error


def _serve(
    pipe: Connection, settings: EncoderSettings, parts: Parts, device: str, skipping: bool, processes: int
) -> None:
    """The body of a process: parts come through the pipe until that is closed, also by the other side's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process ends the others
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    encoder: Encoder | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            name, entries = pipe.recv(), pipe.recv()
            try:
                encoder = encoder or Encoder(settings, device)
                pipe.send(_finish(encoder.part(entries), name, parts, skipping))
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError | ConnectionResetError) or not is_user_error(error):
                    raise
                pipe.send(str(error))
                return
    sys.exit(0)
