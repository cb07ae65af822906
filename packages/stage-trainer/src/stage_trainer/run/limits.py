"""Ends a run that is stuck: a phase that takes longer than `limits` of the recipe allows."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from stage_trainer.recipe.limits import LimitsConfig
from stage_trainer.run.notes import first_to_say

ANNOUNCED = 60.0
"""Seconds after which a phase that still lasts is announced."""
INTERVAL = 1.0
_DOES = {
    "start": "waiting for all ranks to meet",
    "load": "loading weights and data",
    "batch": "waiting for the next batch",
    "compile": "in its first step",
    "step": "in one step",
    "save": "waiting for a checkpoint to be written",
    "evaluate": "evaluating",
}


class Watch:
    """Between `with` and its end, ends this process if its main thread stays in one phase beyond the phase's limit.

    The heartbeat of `run.watchdog` notices a rank that is gone or stopped once they have met; this one a rank that is
    alive and gets no further, and one that never arrived. The first rank of a machine to notice says so, those that
    wait for another one last.

    Args:
        limits: seconds of each phase.
        folder: where the ranks of a machine leave notes.
    """

    def __init__(self, limits: LimitsConfig, folder: Path, *, interval: float = INTERVAL):
        self.limits, self.folder, self.interval = limits, folder, interval
        self.rank, self.world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.gpu = False
        self._main = threading.main_thread().ident
        self._phase: tuple[str, float, float] | None = None  # name, its limit, when it began
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="limits", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextlib.contextmanager
    def phase(self, name: str, times: int = 1) -> Iterator[None]:
        """The main thread is in a phase of `LimitsConfig`, which may take `times` its limit; then in the one around it,
        whose time begins anew."""
        around = self._phase
        self._phase = (name, times * getattr(self.limits, name), time.monotonic())
        try:
            yield
        finally:
            self._phase = around and (*around[:2], time.monotonic())

    def _watch(self) -> None:
        last, seen, told, suspended = time.monotonic(), self._phase, False, 0.0
        while not self._ended.wait(self.interval):
            now, phase = time.monotonic(), self._phase
            if phase is not seen:
                seen, told, suspended = phase, False, 0.0
            if now - last > 3 * self.interval + 2:  # this process was suspended, and nothing is stuck
                suspended += now - last
            last = now
            if phase is None:
                continue
            name, limit, began = phase
            lasted = now - began - suspended
            if lasted > ANNOUNCED and not told and self.rank == 0:
                told = True
                print(f"{_DOES[name]} for {lasted:.0f} seconds now; limits.{name} ends it after {limit:g}", flush=True)
            if lasted > limit + self._others(name) and phase is self._phase:
                self._give_up(name, limit)

    def _others(self, name: str) -> float:
        """Seconds that a step may wait for what another rank rightly does."""
        if self.world == 1 or name not in ("step", "compile") or not (self.gpu or self._waits()):
            return 0.0
        return 2 * self.limits.batch + self.limits.save + self.limits.compile

    def _waits(self) -> bool:
        """Whether the main thread is in a collective call, where only the host can see it: not with NCCL."""
        return any("/torch/distributed/" in frame.f_code.co_filename for frame in self._frames())

    def _frames(self) -> list[FrameType]:
        """Those of the main thread, innermost first."""
        found, frame = list[FrameType](), sys._current_frames().get(self._main or 0)
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found

    def _give_up(self, name: str, limit: float) -> None:
        if self._waits() and self._ended.wait(5 * self.interval):  # the one that is waited for has more to say
            return
        ours = (f for f in self._frames() if "stage_trainer" in f.f_code.co_filename)
        frame = next(ours, None)
        where = f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})" if frame else ""
        if self.world == 1 or first_to_say(self.folder, f"limits.{name} of {os.getppid()}"):
            print(
                f"stage-trainer: rank {self.rank} was {_DOES[name]} for more than {limit:g} seconds{where} and counts "
                f"as stuck; raise limits.{name} if it was not. The same command goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(1)
