"""Which checkpoint is the best."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from stage_trainer.checkpoint.state import Best, RunState
from stage_trainer.errors import UserError
from stage_trainer.measure import Measure


def check_best(metric: str | None, measures: Mapping[str, Measure] | None) -> None:
    """Finds before the first step whether `checkpoint.best` names something that will be measured.

    Raises:
        UserError: it does not; the message has the nearest names that do.
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
    """What makes this the best model so far by `metric`, entered in `state`; or None.

    Args:
        values, measures: what was measured, and what it means, by name.
        metric: the name that counts; None: nothing does.
        state: knows the best so far.
    """
    if metric is None:
        return None
    value, former = values[metric], state.best
    if not math.isfinite(value):
        return None
    if former and former["metric"] == metric:  # of another name, it is of an earlier recipe and tells nothing
        gain = value - former["value"]
        if (gain if measures[metric].higher_is_better else -gain) <= 0:
            return None
    state.best = Best(metric=metric, value=value)
    return state.best
