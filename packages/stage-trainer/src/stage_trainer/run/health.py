"""The health of a run: skipped steps, jumps of the loss, collapsed embeddings."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from statistics import median

from contrastive_losses import LossStats

from stage_trainer.checkpoint.state import RunState
from stage_trainer.errors import UserError
from stage_trainer.run.hooks import Hook, Step
from stage_trainer.tasks.task import Losses

SPIKE = 2.0
"""A loss this many times the median of the last ones is a jump."""
WINDOW = 20
"""Logged losses of which that is the median; with fewer than half of them nothing is reported."""
ALIKE = 0.99
"""Mean cosine of the hardest negatives above which, with hardly a pair told apart, the embeddings have collapsed."""


class Health(Hook):
    """Counts skipped steps, and warns of signs that training fails.

    Args:
        limit: this many skipped steps in a row end the run.
        state: counts the skipped steps.
        say: shows a line.
    """

    def __init__(self, limit: int, state: RunState, say: Callable[[str], None]):
        self.limit, self.state, self.say = limit, state, say
        self._in_a_row = 0
        self._losses: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._warned: set[str] = set()

    def after_step(self, step: Step) -> None:
        if not step.applied:
            self._skipped(step)
            return
        self._in_a_row = 0
        if step.scalars is not None:
            step.scalars["trouble/skipped_steps"] = self.state.skipped
            for warning in self.warnings(step.losses):
                self.say(f"step {step.number}: {warning}")

    def _skipped(self, step: Step) -> None:
        self.state.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise UserError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, the last one step "
                f"{step.number}; the model is as it was before them. {step.diagnosis} Lower the learning rate, "
                "lengthen warmup_steps, or try precision: fp32, and start again from the last checkpoint "
                "(max_skipped is the limit)"
            )
        self.say(f"step {step.number} is skipped: a gradient is not finite. {step.diagnosis}")

    def warnings(self, losses: Losses) -> list[str]:
        """Notes the losses of a logged step, with their `LossStats` if they have them; returns warnings, each kind once
        until it is over."""
        warnings = []
        for task, (loss, stats) in losses.items():
            value, former = loss.item(), self._losses[task]
            jumped = len(former) >= WINDOW // 2 and value > SPIKE * median(former)
            if self._begins(f"{task} jumps", jumped):
                warnings.append(
                    f"the loss of {task} jumped to {value:.3f}, from a median of {median(former):.3f}; if it does not "
                    "come back, lower the learning rate and go on from an earlier checkpoint"
                )
            if math.isfinite(value):
                former.append(value)
            if isinstance(stats, LossStats):
                told_apart, hardest = float(stats.query_to_target_accuracy[0]), float(stats.hardest_negative_cosine[0])
                alike = len(former) >= WINDOW // 2 and hardest > ALIKE and told_apart < 0.1
                if self._begins(f"{task} collapses", alike):
                    warnings.append(
                        f"the embeddings of {task} are nearly all alike: the hardest negatives' mean cosine is "
                        f"{hardest:.4f} and {told_apart:.1%} of the queries find their target; usually the "
                        "learning rate is too high"
                    )
        return warnings

    def _begins(self, name: str, now: bool) -> bool:
        began = now and name not in self._warned
        (self._warned.add if now else self._warned.discard)(name)
        return began
