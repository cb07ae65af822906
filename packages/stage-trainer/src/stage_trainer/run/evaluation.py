"""Evaluation while a stage trains, and which checkpoint is the best."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from stage_trainer.checkpoint.broadcast import from_rank_0
from stage_trainer.checkpoint.save import Saver
from stage_trainer.checkpoint.state import Best, RunState
from stage_trainer.errors import UserError
from stage_trainer.metrics.measure import Measure
from stage_trainer.run.hooks import Hook, Step
from stage_trainer.run.monitor import Monitor
from stage_trainer.run.stop_signal import StopSignal
from stage_trainer.tasks.task import Validation


class Evaluation(Hook):
    """Measures on held-out data every `every` steps and after the last one.

    An evaluation may take longer than a scheduler waits after it asks a run to stop: one that is due then is postponed
    until the run resumes.

    Args:
        validation: what is measured; None: nothing.
        metric: decides which checkpoint is the best (`checkpoint.best`).
        state: has the best value so far, and whether an evaluation was postponed.

    Raises:
        UserError: nothing measures `metric`.
    """

    phase = "evaluate"

    def __init__(
        self,
        validation: Validation | None,
        every: int,
        metric: str | None,
        state: RunState,
        monitor: Monitor,
        saver: Saver,
        stop_signal: StopSignal,
    ):
        check_best(metric, validation.measures if validation else None)
        self.validation, self.every, self.metric, self.state = validation, every, metric, state
        self.monitor, self.saver, self.stop_signal = monitor, saver, stop_signal

    def before_first_step(self, step: int) -> None:
        if self.validation and self.state.unmeasured:
            values = self._measure(self.validation, step)
            if best := better(values, self.validation.measures, self.metric, self.state):
                self.saver.note_best(step, best)
            self.state.unmeasured = False

    def after_step(self, step: Step) -> None:
        last = step.done == self.monitor.stage.steps
        if not self.validation or not (last or step.done % self.every == 0):
            self.state.unmeasured = False
            return
        self.state.unmeasured = step.totals.asked and not last
        if self.state.unmeasured:
            return
        values = self._measure(self.validation, step.done)
        step.best = better(values, self.validation.measures, self.metric, self.state)
        if last:
            shown = [name for name in values if self.validation.measures[name].headline]
            self.monitor.outcome(self.state.settings, [*shown, *(f"loss/{name}" for name in step.losses)])
        step.totals.asked = self.stop_signal.agreed()

    def _measure(self, validation: Validation, done: int) -> dict[str, float]:
        found = validation.run(done == self.monitor.stage.steps)
        values: dict[str, float] = from_rank_0(found.values)
        self.monitor.measured(found, values, done)
        return values


def check_best(metric: str | None, measures: Mapping[str, Measure] | None) -> None:
    """Checks before the first step that `checkpoint.best` names something that will be measured.

    Raises:
        UserError: it does not; the message names the closest ones.
    """
    if metric is None or (measures and metric in measures):
        return
    near = difflib.get_close_matches(metric, measures or (), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"what is: {', '.join(sorted(measures or ()))}"
    raise UserError(
        f"checkpoint.best is {metric!r}, which nothing measures; "
        + (hint if measures else "there are no held-out data for this stage, so leave it out")
    )


def better(
    values: Mapping[str, float], measures: Mapping[str, Measure], metric: str | None, state: RunState
) -> Best | None:
    """The new best value of `metric`, which is also set in `state`; None if this model is not the best so far.

    Args:
        values, measures: the figures and their meaning, by name.
        metric: the name of the figure to compare; None: no comparison.
        state: has the best value so far.
    """
    if metric is None:
        return None
    value, former = values[metric], state.best
    if not math.isfinite(value):
        return None
    if former and former["metric"] == metric:  # another metric is that of an earlier recipe
        gain = value - former["value"]
        if (gain if measures[metric].higher_is_better else -gain) <= 0:
            return None
    state.best = Best(metric=metric, value=value)
    return state.best
