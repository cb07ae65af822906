"""When checkpoints are written, and how a run that was asked to stop ends."""

from __future__ import annotations

import time

import torch

from stage_trainer.checkpoint.save import Saver
from stage_trainer.checkpoint.state import RunState
from stage_trainer.engine import Engine
from stage_trainer.errors import Stopped, UserError
from stage_trainer.run.environment import peak_memory
from stage_trainer.run.hooks import Hook, Step
from stage_trainer.run.stop_signal import StopSignal
from stage_trainer.tasks.task import Batches


class Saving(Hook):
    """Saves every `every` steps (0: never), after the last step before `stop`, and the best model; saves and
    ends a run that is asked to stop.

    Args:
        state: saved in every checkpoint; its seconds are counted here.
        data: what the steps read.
        stop: the step before which this part of the stage ends.
        steps: of the stage.
    """

    phase = "save"

    def __init__(
        self,
        saver: Saver,
        engine: Engine,
        state: RunState,
        stop_signal: StopSignal,
        data: Batches,
        *,
        every: int,
        stop: int,
        steps: int,
    ):
        self.saver, self.engine, self.state, self.stop_signal = saver, engine, state, stop_signal
        self.data = data
        self.every, self.stop, self.steps = every, stop, steps
        self._began, self._seconds = time.perf_counter(), state.seconds

    def after_step(self, step: Step) -> None:
        if step.done == self.stop or step.totals.asked or step.best or (self.every and step.done % self.every == 0):
            self._save(step)
        if step.totals.asked and (step.done < self.steps or self.state.unmeasured):
            self.saver.finish()
            raise stopped(step.done, self.steps)

    def after_last_step(self) -> None:
        self.saver.finish()  # signals are still caught: a stop that is requested meanwhile counts
        if self.stop_signal.agreed() and self.stop < self.steps:
            raise stopped(self.stop, self.steps)

    def _save(self, step: Step) -> None:
        self._check_parameters(step.number)
        self.state.step = step.done
        # Of lanes that several ranks read, where the last of them is.
        reading = sorted(item for rank in self.stop_signal.gather([self.data.state_dict()]) for item in rank.items())
        self.state.reading = dict(reading)
        self.state.seconds = self._seconds + time.perf_counter() - self._began
        self.state.peak_memory_bytes = max(peak_memory(), self.state.peak_memory_bytes)
        self.saver.save(self.engine, self.state, step.best)

    def _check_parameters(self, step: int) -> None:
        """Stops before a model with parameters that are not finite takes the place of a good one."""
        lost = [name for name, p in self.engine.parameters.items() if not torch.isfinite(p.detach()).all()]
        if lost:
            raise UserError(
                f"after step {step} {len(lost)} parameters are not finite ({lost[0]}, …); lower the learning rate or "
                f"lengthen warmup_steps. Checkpoints in {self.saver.directory} are from before"
            )


def stopped(done: int, steps: int) -> Stopped:
    """What ends a run that was asked to stop, when a checkpoint of `done` steps is on the disk."""
    return Stopped(f"stopped after step {done} of {steps}, as asked; the same command goes on from there")
