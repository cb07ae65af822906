"""The state of a run that a checkpoint holds beside the model and the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Best(TypedDict):
    """The best value so far of the metric `checkpoint.best`."""

    metric: str
    value: float


@dataclass
class RunState:
    """The settings of a stage's run, and what it has counted over all its processes.

    Attributes:
        settings: those that affect the numbers, flat; a run resumes only with the same ones.
        data: {data set: hash of its manifest}, and the hash of the model that the stage started from.
        versions: of Python, the machine and the libraries of this process.
        seconds: spent in steps.
        peak_memory_bytes: peak main memory, summed over the ranks' processes.
        skipped: steps whose gradient was not finite.
        best: the best value so far of `checkpoint.best`.
        unmeasured: whether the evaluation after the last step was postponed.
        texts_drawn, texts_cut: texts by source, and how many of them were cut to `max_tokens`.
        reading: how the reading of data goes on (`Batches.state_dict`).
        step: steps done.
    """

    settings: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    skipped: int = 0
    best: Best | None = None
    unmeasured: bool = False
    texts_drawn: dict[str, int] = field(default_factory=dict)
    texts_cut: dict[str, int] = field(default_factory=dict)
    reading: dict[str, list[int]] = field(default_factory=dict)
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, for state.json."""
        return dataclasses.asdict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores the counts. Settings, data and versions stay this process's; a count that an earlier release did not
        write has its default."""
        fresh = RunState(self.settings, self.data, self.versions)
        for name, default in vars(fresh).items():
            if name not in ("settings", "data", "versions"):
                setattr(self, name, saved.get(name, default))
