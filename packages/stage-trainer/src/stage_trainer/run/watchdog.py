"""When one rank fails, all end soon, and the reason is the last line on the screen.

A launcher ends the ranks of its own machine; the heartbeat does it for several machines, and for a rank that hangs.
Ranks that fail only because another one did print nothing, so that its traceback is not buried under theirs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from stage_trainer.errors import Stopped, is_user_error
from stage_trainer.run.notes import first_to_say, note_of
from stage_trainer.run.stop import NOTHING_LOST, leave_when_asked

SILENCE = 40.0
"""Seconds without a sign of life after which a rank counts as dead."""
INTERVAL = 4.0
"""Seconds between two signs of life."""
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "socket closed", "connection refused",
         "connection was likely closed")  # fmt: skip


@contextlib.contextmanager
def one_reason(folder: Path, rank: int, world: int) -> Iterator[None]:
    """Lets the first rank that fails print its error, and ends the others silently.

    Args:
        folder: where ranks of one machine leave each other a note; every rank enters before the first collective call.
    """
    if world == 1:
        yield
        return
    if rank == 0:
        for note in folder.glob(".failure-*"):
            note.unlink(missing_ok=True)
    torch.distributed.barrier()
    try:
        with leave_when_asked(rank, folder):
            yield
    except Stopped as error:
        _say_once(folder, f"stage-trainer: {error}")
        raise SystemExit(Stopped.EXIT_CODE) from None
    except Exception as error:
        lost = _lost_contact(error)
        if lost and _another_spoke(folder):
            _leave(Stopped.EXIT_CODE if note_of(folder, NOTHING_LOST).exists() else 1)
        if lost:
            _say_once(
                folder,
                "stage-trainer: the connection to a rank is lost, and it left no reason: it was killed, perhaps out of "
                "memory, or its machine is gone. The same command goes on from the last checkpoint",
            )
            _leave(1)
        if is_user_error(error):
            _say_once(folder, f"stage-trainer: {error}")
            _leave(2)
        _say_once(folder, f"{type(error).__name__}: {error}", f"rank {rank} failed:\n{traceback.format_exc()}")
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends this process at once: an orderly end may wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Heartbeat:
    """Between `with` and its end, ends this process if a rank has given no sign of life for `silence` seconds.

    Rank 0 listens to all, the others to rank 0, through the store by which the ranks found each other. A rank that
    leaves by an exception is missed like one that is killed.
    """

    def __init__(self, rank: int, world: int, *, silence: float = SILENCE, interval: float = INTERVAL):
        self.rank, self.world, self.silence, self.interval = rank, world, silence, interval
        self._ended = threading.Event()
        self._last_round = time.monotonic()
        self._threads = [threading.Thread(target=f, name="heartbeat", daemon=True) for f in (self._beat, self._watch)]

    def __enter__(self) -> Heartbeat:
        if self.world > 1:
            self._store: Any = torch.distributed.distributed_c10d._get_default_store().clone()
            self._last_round = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        if self.world > 1 and kind is None:
            self._threads[0].join()
            with contextlib.suppress(RuntimeError):  # the store goes with rank 0
                self._store.set(f"alive/{self.rank}", b"done")

    def _beat(self) -> None:
        heard: dict[int, tuple[bytes, float]] = {}
        count, last = 0, time.monotonic()
        while not self._ended.wait(self.interval):
            now, count = time.monotonic(), count + 1
            if now - last > 3 * self.interval:  # this process itself was suspended, as others may have been
                heard = {}
            last = now
            try:
                self._store.set(f"alive/{self.rank}", str(count).encode())
                for other in range(self.world) if self.rank == 0 else (0,):
                    if other == self.rank or not self._store.check([f"alive/{other}"]):
                        continue
                    sign = self._store.get(f"alive/{other}")
                    if other not in heard or heard[other][0] != sign or sign == b"done":
                        heard[other] = sign, now
                    elif now - heard[other][1] > self.silence:
                        self._give_up(f"rank {other} has given no sign of life for {self.silence:.0f} seconds")
            except RuntimeError as error:
                if not self._ended.wait(self.interval):
                    self._give_up(f"rank 0 cannot be reached any more ({error})")
            self._last_round = time.monotonic()

    def _watch(self) -> None:
        """Gives up when the store itself, in rank 0's process, no longer answers."""
        last = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - last > 3 * self.interval:  # as above
                self._last_round = now
            last = now
            if now - self._last_round > self.silence + 2 * self.interval:
                self._give_up(f"rank 0 has given no sign of life for {self.silence:.0f} seconds")

    def _give_up(self, reason: str) -> None:
        text = f"rank {self.rank} ends: {reason}. The same command goes on from the last checkpoint"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)


def _say_once(folder: Path, text: str, whole: str | None = None) -> None:
    """Prints a text (or the whole text that it stands for) unless another rank of this machine has."""
    if first_to_say(folder, text):
        print(whole or text, file=sys.stderr, flush=True)


def _another_spoke(folder: Path, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(folder.glob(".failure-*")):
            return True
        time.sleep(0.1)
    return False


def _lost_contact(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)
