"""What a run shows: TensorBoard's pages, and a line of progress with the time left."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from stage_trainer.errors import UserError
from stage_trainer.evaluation.tables import joined
from stage_trainer.files import writing
from stage_trainer.run.hooks import Hook, Step
from stage_trainer.run.text_counts import TextCounts
from stage_trainer.tasks.task import Charts, Losses, Measured

_QUIET = 15.0
"""Seconds between two lines of progress where there is no terminal for a progress bar."""


_COMPARED = (
    "stage.batch.", "stage.lr.", "stage.steps", "stage.warmup_steps", "stage.min_lr_ratio", "stage.max_tokens",
    "stage.resolution", "stage.patch_dropout", "stage.layer_decay.", "stage.loss.kind", "stage.loss.dims",
    "stage.trainable.", "optimizer.name", "optimizer.weight_decay", "model.temperature", "precision", "seed",
)  # fmt: skip
"""Settings on TensorBoard's HPARAMS page, by prefix: among all sixty, in alphabetical order, these would be lost."""


class Sink(Protocol):
    """Where scalars go besides TensorBoard: Weights & Biases, MLflow, a file of your own."""

    def scalar(self, name: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


def open_sinks(names: Sequence[str], directory: Path, settings: dict[str, Any]) -> list[Sink]:
    """The recipe's `sinks`, "module:callable" each, called with the stage's folder and its settings.

    Raises:
        UserError: a name of another form, a module or callable that does not exist.
    """
    sinks = []
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            make = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the module's own code runs here
            raise UserError(f"sinks: {name!r} cannot be imported ({error}); {_EXPECTED}") from error
        with _calling(name):
            sink = make(directory, settings)
        if not (callable(getattr(sink, "scalar", None)) and callable(getattr(sink, "close", None))):
            raise UserError(f"sinks: {name!r} made a {type(sink).__name__} without scalar or close; {_EXPECTED}")
        sinks.append(sink)
    return sinks


_EXPECTED = (
    "expected module:callable, such as my_wandb:Sink, where Python can import it, taking (directory, settings) and "
    "having scalar(name, value, step) and close()"
)


@contextlib.contextmanager
def _calling(name: str) -> Iterator[None]:
    """Turns whatever a sink raises into a UserError that names it and its line."""
    try:
        yield
    except UserError:  # another one's, that is on its way through
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"sinks: {name!r} raised {type(error).__name__}: {error} ({Path(place.filename).name}, line "
            f"{place.lineno}); {_EXPECTED}, or leave it out of the recipe"
        ) from error


@dataclass(frozen=True)
class Shown:
    """What a monitor needs to know about a stage.

    Attributes:
        title: of the line of progress.
        start: the first step of this process; what an earlier process logged from there on is hidden.
        steps: of the stage.
        every: steps between two entries.
        charts: TensorBoard's Custom Scalars page.
        sources: of texts, as `Drawn.of_sources` counts them.
        max_tokens: of a text; longer ones are cut. None: this stage cuts no texts.
        peak: operations a second of all ranks' devices, at most, if that is known.
        predicted: seconds of a step (`plan.auto`), if that is known.
    """

    title: str
    start: int
    steps: int
    every: int
    charts: Charts = field(default_factory=dict)
    sources: Sequence[str] = ()
    max_tokens: int | None = None
    peak: float | None = None
    predicted: float | None = None


class Monitor(Hook):
    """Writes scalars to `directory` and shows progress; on ranks other than 0 it does nothing.

    Args:
        directory: TensorBoard's folder of this stage.
        active: whether this is rank 0.
        sinks: where scalars go besides TensorBoard; closed with the monitor.
        texts: the counts of the stage's earlier processes, which are continued.
    """

    def __init__(
        self,
        directory: Path,
        stage: Shown,
        *,
        active: bool,
        sinks: Sequence[Sink] = (),
        texts: TextCounts | None = None,
    ):
        self.stage, self.active, self.sinks, self.texts = stage, active, sinks, texts or TextCounts({}, {})
        self._samples, self._tokens, self._operations, self._wait = 0, 0, 0, 0.0
        self._steps, self._entries = 0, 0
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.directory = directory
            pages = stage.charts.items()
            with writing(directory):
                _keep_order(directory)
                self.writer = SummaryWriter(str(directory), purge_step=stage.start)
                self.writer.add_custom_scalars(
                    {name: {t: ["Multiline", tags] for t, tags in of.items()} for name, of in pages}
                )
            self.bar = tqdm(
                total=stage.steps,
                initial=stage.start,
                desc=stage.title,
                unit="step",
                dynamic_ncols=True,
                mininterval=1,
                disable=not _terminal(),
            )
            self._began, self._shown = time.monotonic(), -_QUIET
        self._since = time.perf_counter()

    def after_step(self, step: Step) -> None:
        self.count(step.samples, step.totals.tokens, step.operations, step.waited)
        self.texts.count(self.stage.sources, step.totals.texts)
        if step.scalars is not None:
            self.log(step.number, step.losses, step.scalars)
        self.advance()

    def measured(self, found: Measured, values: Mapping[str, float], done: int) -> None:
        """Enters what was measured after `done` steps; `values` are those of all ranks."""
        for name, value in values.items():
            self.scalar(name, value, done - 1)
        if found.shown:
            self.say(joined(f"step {done}:", found.shown))
        if self.active and found.picture:
            with writing(self.directory):
                self.writer.add_image("nearest images", np.asarray(found.picture), done - 1, dataformats="HWC")
        if self.active and found.vectors is not None:
            with writing(self.directory):
                self.writer.add_embedding(
                    found.vectors, found.labels, global_step=done - 1, metadata_header=["name", "kind"]
                )

    def should_log(self, step: int) -> bool:
        """Whether this step is logged: every `every` steps, the first and the last."""
        return step % self.stage.every == 0 or step == self.stage.steps - 1

    def count(self, samples: int, tokens: int, operations: int, waited: float) -> None:
        """Counts a step: samples, text tokens and model operations of all ranks, seconds of waiting for data."""
        self._samples += samples
        self._tokens += tokens
        self._operations += operations
        self._wait += waited
        self._steps += 1

    def log(self, step: int, losses: Losses, scalars: dict[str, float]) -> None:
        """Enters a step: the losses by name, further scalars, speed since the last entry."""
        if not self.active:
            return
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = self._samples / seconds
        scalars = {
            **{f"loss/{task}": loss.item() for task, (loss, _) in losses.items()},
            **scalars,
            "speed/samples_per_second": speed,
            "speed/text_tokens_per_second": self._tokens / seconds,
            "speed/model_tflops_per_second": self._operations / seconds / 1e12,
            "speed/data_wait_share": self._wait / seconds,
        }
        # Model FLOPs utilisation: nothing that is computed twice counts (arXiv 2204.02311, appendix B).
        if self.stage.peak:
            scalars["speed/mfu"] = self._operations / seconds / self.stage.peak
        scalars |= self._step_seconds(seconds / max(self._steps, 1))
        scalars |= self.texts.shares(cut=self.stage.max_tokens is not None)
        for name, value in scalars.items():
            self.scalar(name, value, step)
        shown = ", ".join(f"{task} {loss.item():.3f}" for task, (loss, _) in losses.items())
        self._progress(step + 1, f"loss {shown}; {speed:.0f} samples/s")
        if self.stage.max_tokens is not None:
            for line in self.texts.news(self.stage.max_tokens, last=step == self.stage.steps - 1):
                self.say(line)
        self._samples, self._tokens, self._operations, self._wait, self._steps = 0, 0, 0, 0.0, 0
        self._since = time.perf_counter()

    def _step_seconds(self, measured: float) -> dict[str, float]:
        """The time of a step since the last entry beside the predicted one, said once; before the first entry the
        towers may have been compiled."""
        self._entries += 1
        if not self.stage.predicted or self._entries == 1:
            return {}
        if self._entries == 2:
            change = measured / self.stage.predicted - 1
            self.say(f"a step takes {measured:.3g} s; predicted were {self.stage.predicted:.3g} s ({change:+.0%})")
        return {"speed/step_seconds": measured, "speed/step_seconds_predicted": self.stage.predicted}

    def _progress(self, done: int, shown: str) -> None:
        if not self.bar.disable:
            self.bar.set_postfix_str(shown, refresh=False)
        elif (now := time.monotonic()) - self._shown >= _QUIET:
            self._shown = now
            left = (now - self._began) / (done - self.stage.start) * (self.stage.steps - done)
            line = f"{self.stage.title}: step {done} of {self.stage.steps}, {shown}, {in_words(left)} left"
            print(line, file=sys.stderr, flush=True)

    def scalar(self, name: str, value: float, step: int) -> None:
        if self.active:
            with writing(self.directory):  # the event file's own thread hands on what it met
                self.writer.add_scalar(name, value, step)
            for sink in self.sinks:
                with _calling(_name_of(sink)):
                    sink.scalar(name, value, step)

    def outcome(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The settings beside what they led to, for TensorBoard's HPARAMS page; `metrics` are scalars entered before,
        whose last value it shows."""
        if self.active:
            from torch.utils.tensorboard import summary

            shown = {
                name.removeprefix("stage."): value if isinstance(value, str | int | float | bool) else str(value)
                for name, value in settings.items()
                if name.startswith(_COMPARED) and not (name.startswith("stage.batch.") and not value)
            }
            hparams: Callable[..., Any] = summary.hparams  # untyped
            with writing(self.directory):
                for part in hparams(shown, dict.fromkeys(metrics, 0.0)):
                    self.writer.file_writer.add_summary(part)  # type: ignore[attr-defined]

    def advance(self) -> None:
        if self.active:
            self.bar.update()

    def say(self, text: str) -> None:
        if self.active:
            self.bar.write(text)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.active:
            return
        self.bar.leave = kind is None  # so that the reason for a failure is the last line
        self.bar.close()
        with contextlib.ExitStack() as closing:  # each is closed, whatever the others say
            if kind is not None:  # their complaint must not take the place of the reason
                closing.enter_context(contextlib.suppress(UserError))
            for sink in reversed(self.sinks):
                closing.enter_context(_calling(_name_of(sink)))
                closing.callback(sink.close)
            closing.enter_context(writing(self.directory))
            closing.callback(self.writer.close)


def _name_of(sink: Sink) -> str:
    return f"{type(sink).__module__}:{type(sink).__qualname__}"


def _terminal() -> bool:
    """Whether stderr is a terminal of some size: in a log file a bar would be one endless line, and where the size is
    not known, as in some containers, it would not be seen."""
    try:
        return min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError):
        return False


def in_words(seconds: float) -> str:
    """A duration, roughly: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}" if unit != "h" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _keep_order(directory: Path) -> None:
    """Renames the existing event files if they would not sort before the next one. TensorBoard reads files in the order
    of their names, which begin with the time in seconds, and each file overrides earlier ones from its first step on:
    if the clock was set back, an older file would override the newer one."""
    files = sorted(directory.glob("*tfevents*"))
    if not files or files[-1].name < f"events.out.tfevents.{int(time.time()):010d}":
        return
    for number, file in enumerate(files):
        file.rename(directory / f"before-{number:04d}.{file.name[file.name.index('events.') :]}")
