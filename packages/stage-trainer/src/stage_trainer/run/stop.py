"""Signals that ask to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP. Imports nothing heavy, to be set up before all else."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from stage_trainer.errors import Stopped
from stage_trainer.run.notes import first_to_say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]
NOTHING_LOST = "stage-trainer: stopped, as asked, with nothing unsaved; the same command goes on"


@contextlib.contextmanager
def when_asked(handler: Handler) -> Iterator[None]:
    """Between `with` and its end `handler` is called when the process is asked to stop.

    Signals that were blocked until now, by a launcher that wants none to be lost, arrive from here on. SIGHUP that is
    ignored (nohup) stays so.
    """
    chosen = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    former = {n: signal.signal(n, handler) for n in chosen}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    except (Stopped, SystemExit):  # already ending: a second signal must not change the exit code
        former = dict.fromkeys(former, signal.SIG_IGN)
        raise
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def leave_when_asked(rank: int, folder: Path | None = None) -> contextlib.AbstractContextManager[None]:
    """For phases in which nothing would be lost, such as imports and the loading of a model: the process ends at once,
    with exit code 75. Nothing is raised, since libraries swallow exceptions while they are imported.

    Args:
        rank: without a folder, only rank 0 prints the message.
        folder: where the ranks of a machine leave notes; the first one prints the message.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(Exception):
            if first_to_say(folder, NOTHING_LOST) if folder else rank == 0:
                os.write(2, f"{NOTHING_LOST}\n".encode())  # print() may be running just now
            sys.stdout.flush()
        os._exit(Stopped.EXIT_CODE)

    return when_asked(leave)


def launcher_is_gone() -> bool:
    """Whether DeepSpeed's launcher, if it started this process, has ended."""
    return _launcher() != _LAUNCHER


def _launcher() -> tuple[int, int] | None:
    """The process that started this rank (launch.py) and the one above it (`deepspeed`); None without that launcher, or
    where the system does not tell."""
    if "CROSS_SIZE" not in os.environ:
        return None
    parent = os.getppid()
    try:
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return parent, int(fields[1])


_LAUNCHER = _launcher()
