"""Evaluation while a stage trains, and which checkpoint is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from stage_trainer.checkpoint.broadcast import from_rank_0
from stage_trainer.checkpoint.save import Saver
from stage_trainer.checkpoint.state import Best, RunState
from stage_trainer.evaluation.measures import check_best
from stage_trainer.metrics.measure import Measure
from stage_trainer.run.hooks import Hook, Step
from stage_trainer.run.monitor import Monitor
from stage_trainer.run.saving import stopped
from stage_trainer.run.stop_signal import StopSignal
from stage_trainer.tasks.task import Validation


class _AskedToStop(Exception):
    """Between two batches of an evaluation."""


class Evaluation(Hook):
    """Measures on held-out data every `every` steps and after the last one.

    An evaluation may take longer than a scheduler waits after it asks a run to stop: one that is due then, or under
    way, is postponed until the run resumes.

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
        """Makes up for an evaluation that was postponed after `step` steps.

        Raises:
            Stopped: the run was asked to stop once more; the evaluation is still due.
        """
        if not self.validation or not self.state.unmeasured:
            return
        try:
            best = self._measure(self.validation, step, ())
        except _AskedToStop:
            raise stopped(step, self.monitor.stage.steps) from None
        if best:
            self.saver.note_best(step, best)
        self.state.unmeasured = False
        self.saver.note_measured(step, self.state)

    def after_step(self, step: Step) -> None:
        last = step.done == self.monitor.stage.steps
        self.state.unmeasured = False
        if not self.validation or not (last or step.done % self.every == 0):
            return
        try:
            if step.totals.asked:
                raise _AskedToStop
            step.best = self._measure(self.validation, step.done, step.losses)
        except _AskedToStop:
            step.totals.asked = self.state.unmeasured = True
        else:
            step.totals.asked = self.stop_signal.agreed()

    def _measure(self, validation: Validation, done: int, losses: Iterable[str]) -> Best | None:
        """What makes this the best model so far, if it is."""
        last = done == self.monitor.stage.steps
        found = validation.run(last, self._heed)
        values: dict[str, float] = from_rank_0(found.values)
        self.monitor.measured(found, values, done)
        if last:
            shown = [name for name in values if validation.measures[name].headline]
            self.monitor.outcome(self.state.settings, [*shown, *(f"loss/{name}" for name in losses)])
        return better(values, validation.measures, self.metric, self.state)

    def _heed(self) -> None:
        if self.stop_signal.agreed():
            raise _AskedToStop


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
