"""Threads that fetch files before they are needed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import IO, Protocol

from data_prep.shards import ShardError

from stage_trainer.errors import UserError


class Holder(Protocol):
    def hold(self, name: str) -> None:
        """Fetches a file and keeps it."""


class Prefetcher:
    """Lets `data` hold the wanted files, in threads that end when `data` is collected, or with the process.

    Args:
        data: referenced weakly, since the threads would otherwise keep it alive.
        lock: kept open as long as the threads run; its file lock says that this process is the one that prefetches.
        threads: how many files are fetched at once.
    """

    def __init__(self, data: Holder, lock: IO[bytes], threads: int):
        self._lock = lock
        self._wanted: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        for _ in range(threads):
            threading.Thread(target=self._run, args=(weakref.ref(data),), name="prefetch", daemon=True).start()
        weakref.finalize(data, self._end)

    def want(self, names: list[str]) -> None:
        """Replaces the files that still wait, most urgent first."""
        with self._changed:
            self._wanted = names
            self._changed.notify_all()

    def _run(self, reference: weakref.ref[Holder]) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._ended:
                    self._changed.wait()
                if self._ended or (data := reference()) is None:
                    return
                name = self._wanted.pop(0)
            with contextlib.suppress(ShardError, UserError):  # reading the file raises the error again
                data.hold(name)
            del data

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._lock.close()
            self._changed.notify_all()
