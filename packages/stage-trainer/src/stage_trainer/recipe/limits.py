"""How long each part of a run may take before it counts as stuck, and how large an image may be."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

MAX_PIXELS = 50_000_000
"""Of an image, unless a recipe or an option says otherwise."""


@dataclass(frozen=True)
class LimitsConfig:
    """Seconds after which the run ends with a message instead of hanging. What takes over a minute says so once.

    `start`: until all ranks have met; `load`: fetching weights, opening data and building the model, before the first
    step and after a change of resolution; `batch`: the wait for the next batch, twice if worker processes make it, as
    they are started again once; `compile`: the first step; `step`: every other one; `save`: the wait for a checkpoint
    to be written; `evaluate`: one evaluation. With several ranks a step may also wait for another one's `batch` and
    `save`. Numbers of a day and more are as good as none.
    """

    start: float = 300.0
    load: float = 3600.0
    batch: float = 900.0
    compile: float = 1800.0
    step: float = 600.0
    save: float = 1800.0
    evaluate: float = 7200.0
