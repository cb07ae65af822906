"""A progress line: redrawn in place on a terminal, written every half minute to a log file.

Not tqdm: units done in an earlier run count as done and not towards the rate.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

LOG_INTERVAL_S = 30.0  # seconds between two lines where there is no terminal to draw over


class Progress:
    """Shows units done of a total, samples written, their rate and the time left."""

    def __init__(self, total: int, *, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()
        self._units = self._new_units = self._samples = 0
        self._drawn = 0  # characters of the line on the terminal

    def add(self, samples: int, *, new: bool = True) -> None:
        """Count a unit that is done, now (`new`) or in a run before this one."""
        self._units += 1
        self._new_units += new
        self._samples += samples if new else 0
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else LOG_INTERVAL_S):
            self._shown = now
            self._show(now - self._started)

    def finish(self) -> None:
        """End the line."""
        if self._terminal:
            self._show(time.monotonic() - self._started)
            self._stream.write("\n")

    def clear(self) -> None:
        """Erase the line before other output; the next unit draws it again."""
        if self._terminal:
            self._stream.write("\r" + " " * self._drawn)
            self._stream.write("\r")
            self._stream.flush()

    def _show(self, seconds: float) -> None:
        share = self._units / self._total
        left = seconds / self._new_units * (self._total - self._units) if self._new_units else 0.0
        text = (
            f"{share:4.0%} {self._units} of {self._total} units, {self._samples} samples, "
            f"{self._samples / max(seconds, 1e-9):.0f}/s, {_clock(left)} left"
        )
        if self._terminal:
            done = round(20 * share)
            line = f"[{'#' * done}{'.' * (20 - done)}] {text}"
            self._stream.write("\r" + line.ljust(self._drawn))
            self._drawn = len(line)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
