"""The ledger of corrupt samples: which were replaced, when and why; it stops a run that has too many."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from stage_trainer.data.drawn import Corrupt
from stage_trainer.errors import Stopped, UserError
from stage_trainer.files import writing
from stage_trainer.run.hooks import Hook, Step

ALWAYS_ALLOWED = 10
"""Up to this many corrupt samples never stop a run, however few samples it has drawn so far."""


class Ledger(Hook):
    """Appends to a JSON lines file: step, shard, key and reason of each sample that was replaced.

    Args:
        path: the file; kept and continued when a run goes on.
        limit: share of the samples drawn by this process's run that may be corrupt.
        active: whether this rank writes; all of them count.
        say: shows a line at the end, if there were any.
    """

    def __init__(self, path: Path, limit: float, active: bool, say: Callable[[str], None] = print):
        self.path, self.limit, self.active, self.say = path, limit, active, say
        self.count = self._drawn = 0

    def after_step(self, step: Step) -> None:
        self._drawn += step.samples
        if step.totals.corrupt:
            self.enter(step.totals.corrupt, step.number, self._drawn)
        if step.scalars is not None:
            step.scalars["trouble/corrupt_samples"] = self.count

    def enter(self, corrupt: Sequence[Corrupt], step: int, drawn: int) -> None:
        """Enters the corrupt samples of a step; `drawn` is the number of samples drawn so far by all ranks.

        Raises:
            UserError: there are too many; raised on every rank.
        """
        self.count += len(corrupt)
        if self.active and corrupt:
            # A name of a foreign tar may hold bytes that are not UTF-8.
            with writing(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                for entry in corrupt:
                    file.write(json.dumps({"step": step, **dataclasses.asdict(entry)}, ensure_ascii=False) + "\n")
        if self.count > max(ALWAYS_ALLOWED, self.limit * drawn):
            raise UserError(
                f"{self.count} of {drawn} samples drawn were corrupt, more than max_corrupt={self.limit:g} allows; "
                f"{self.path} lists them, the last one because: {corrupt[-1].reason}"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.count and (kind is None or issubclass(kind, Stopped)):
            self.say(f"{self.count:,} samples could not be read and were replaced by others; {self.path} lists them")
