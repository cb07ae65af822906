"""What runs after every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from stage_trainer.checkpoint.state import Best
from stage_trainer.data.drawn import Corrupt
from stage_trainer.tasks.task import Losses


@dataclass
class Totals:
    """Sums over the ranks' parts of a step.

    Attributes:
        asked: whether the run has been asked to stop.
        tokens, squared_tokens: of texts, the sums of their lengths and of the squares.
        texts: by source, how many were drawn, then how many of them were cut (`Drawn.of_sources`).
        corrupt: samples that were replaced.
        fetched: bytes of remote data, by machine.
    """

    asked: bool
    tokens: int
    squared_tokens: int
    texts: Sequence[int]
    corrupt: Sequence[Corrupt]
    fetched: Sequence[int] = ()


@dataclass
class Step:
    """What a hook is told of a step.

    Attributes:
        number: from 0.
        losses: by name, on the device.
        applied: whether the model was updated.
        diagnosis: of a step that was not applied, where a gradient was not finite.
        scalars: of a step that is logged, what is shown beside the losses; None: it is not logged.
        samples: in the global batch.
        operations: floating-point operations of the model, over all ranks.
        waited: seconds that this rank waited for the batch.
        totals: over all ranks.
        best: what makes this the best model so far, if it is.
    """

    number: int
    losses: Losses
    applied: bool
    diagnosis: str
    scalars: dict[str, float] | None
    samples: int
    operations: int
    waited: float
    totals: Totals
    best: Best | None = None

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.number + 1


class Hook:
    """Something that runs after every step. Hooks run in a fixed order; a later one sees what earlier ones set in the
    step. All calls are made on every rank."""

    phase = "step"
    """Which of the recipe's `limits` holds for its calls."""

    def before_first_step(self, step: int) -> None:
        """Called when everything is ready for `step`."""

    def after_step(self, step: Step) -> None:
        """Called when the model has been updated, or the update skipped.

        Raises:
            UserError: the run ends here.
            Stopped: the run ends here, because it was asked to.
        """

    def after_last_step(self) -> None:
        """Called when the last step's hooks have run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Called in any case, in reverse order."""
