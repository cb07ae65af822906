"""The ledger of corrupt samples: which were replaced, when and why; it stops a run that has too many."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from stage_trainer.data.batches import Corrupt
from stage_trainer.errors import UserError

ALWAYS_ALLOWED = 10
"""Up to this many corrupt samples never stop a run, however few samples it has drawn so far."""


class Ledger:
    """Appends to a JSON lines file: step, shard, key and reason of each sample that was replaced.

    Args:
        path: the file; a resumed run appends to it.
        limit: the share of the samples drawn since this start of the run that may be corrupt.
        active: whether this rank writes; all ranks count.
    """

    def __init__(self, path: Path, limit: float, active: bool):
        self.path, self.limit, self.active = path, limit, active
        self.count = 0

    def enter(self, corrupt: Sequence[Corrupt], step: int, drawn: int) -> None:
        """Enters the corrupt samples of a step; `drawn` is the number of samples drawn so far by all ranks.

        Raises:
            UserError: there are too many; raised on every rank.
        """
        self.count += len(corrupt)
        if self.active and corrupt:
            with self.path.open("a", encoding="utf-8") as file:
                for entry in corrupt:
                    file.write(json.dumps({"step": step, **dataclasses.asdict(entry)}, ensure_ascii=False) + "\n")
        if self.count > max(ALWAYS_ALLOWED, self.limit * drawn):
            raise UserError(
                f"{self.count} of {drawn} samples drawn were corrupt, more than max_corrupt={self.limit:g} allows; "
                f"{self.path} lists them, the last one because: {corrupt[-1].reason}"
            )
