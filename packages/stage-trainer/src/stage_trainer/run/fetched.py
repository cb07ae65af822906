"""How much remote data each machine has fetched."""

from __future__ import annotations

from stage_trainer.run.hooks import Hook, Step


class Fetched(Hook):
    """Shows the gigabytes that each machine has fetched since this process began, once there are any."""

    def __init__(self) -> None:
        self._bytes: list[int] = []

    def after_step(self, step: Step) -> None:
        found = step.totals.fetched
        self._bytes = [before + new for before, new in zip(self._bytes or [0] * len(found), found, strict=True)]
        if step.scalars is not None and any(self._bytes):
            step.scalars |= {f"fetched_gigabytes/machine {n}": of / 1e9 for n, of in enumerate(self._bytes)}
