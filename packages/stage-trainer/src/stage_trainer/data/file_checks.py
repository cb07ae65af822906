"""Whether the files of data sets are there, in their full size: one process of a machine looks at them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from data_prep.shards import Dataset, ShardError

from stage_trainer.errors import UserError

AT_ONCE = 2000
"""Shards, together, that are looked at before the first step; a fraction of a second, also on a shared disk."""


class FileChecks:
    """Looks at every file of some data sets: many of them in a thread, while training begins.

    The first rank of each machine (LOCAL_RANK 0) looks, for all of its ranks: 64 that open 80,000 shards would ask a
    shared disk for ten million files.

    Raises:
        UserError: a file is missing or has another size than the manifest says, and the files are few.
    """

    def __init__(self, data_sets: Sequence[Dataset]):
        self._fault: str | None = None
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        if sum(len(data.shards) for data in data_sets) <= AT_ONCE:
            self._look(data_sets)
            self.raise_fault()
        else:
            # It ends with the process. Processes that load data are forked without it.
            threading.Thread(target=self._look, args=(data_sets,), name="file checks", daemon=True).start()

    def raise_fault(self) -> None:
        """UserError that names the first file at fault, as soon as it is known."""
        if self._fault is not None:
            raise UserError(self._fault)

    def _look(self, data_sets: Sequence[Dataset]) -> None:
        try:
            for data in data_sets:
                data.check()
        except (ShardError, OSError) as error:
            self._fault = str(error)
