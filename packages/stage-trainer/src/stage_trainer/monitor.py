"""What a person sees of a run: TensorBoard scalars and one line with the time left."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm


class Monitor:
    """Writes scalars to `directory` and shows progress; on ranks other than 0 it does nothing.

    Args:
        directory: TensorBoard's folder of this stage.
        start: the first step of this process; what a former process logged at or after it is hidden.
        steps: of the stage.
        every: steps between two entries.
    """

    def __init__(self, directory: Path, *, title: str, start: int, steps: int, every: int, active: bool):
        self.every, self.active, self.steps = every, active, steps
        self.seen: Counter[str] = Counter()
        self._samples, self._tokens, self._wait = 0, 0, 0.0
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=start)
            self.bar = tqdm(total=steps, initial=start, desc=title, unit="step", dynamic_ncols=True, mininterval=1)
        self._since = time.perf_counter()

    def wants(self, step: int) -> bool:
        """Whether this step is logged: every `every` steps, the first and the last."""
        return step % self.every == 0 or step == self.steps - 1

    def count(self, samples: int, tokens: int, waited: float, seen: Counter[str]) -> None:
        """Takes note of a step: samples and text tokens of all ranks, seconds spent waiting for data, texts seen."""
        self._samples += samples
        self._tokens += tokens
        self._wait += waited
        self.seen.update(seen)

    def log(self, step: int, losses: dict[str, tuple[Tensor, Any]], scalars: dict[str, float]) -> None:
        """Enters a step: the losses by task, further scalars, speed since the last entry."""
        if not self.active:
            return
        seconds = time.perf_counter() - self._since
        for task, (loss, _) in losses.items():
            self.writer.add_scalar(f"loss/{task}", loss.item(), step)
        speed = self._samples / max(seconds, 1e-9)
        scalars = {
            **scalars,
            "speed/samples_per_second": speed,
            "speed/text_tokens_per_second": self._tokens / max(seconds, 1e-9),
            "speed/data_wait_share": self._wait / max(seconds, 1e-9),
        }
        total = sum(self.seen.values()) or 1
        for source, count in _by_source(self.seen).items():
            scalars[f"texts_seen/{source}"] = count / total
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        shown = {task: f"{loss.item():.3f}" for task, (loss, _) in losses.items()}
        self.bar.set_postfix({**shown, "samples/s": f"{speed:.0f}"}, refresh=False)
        self._samples, self._tokens, self._wait, self._since = 0, 0, 0.0, time.perf_counter()

    def scalar(self, name: str, value: float, step: int) -> None:
        if self.active:
            self.writer.add_scalar(name, value, step)

    def advance(self) -> None:
        if self.active:
            self.bar.update()

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.close()
            self.writer.close()


def _by_source(seen: Counter[str]) -> Counter[str]:
    """Counts of kind/source/language keys, summed over languages."""
    by_source: Counter[str] = Counter()
    for name, count in seen.items():
        by_source[name.rpartition("/")[0]] += count
    return by_source
