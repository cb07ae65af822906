"""The folder with local copies of remote files: which process writes in it, and what is evicted when it is full.

A copy is named after its source, CACHE/https/HOST/PATH@FINGERPRINT/00000.tar. All processes of a machine share the
folder, and there is no list of its content. The process that fetches a file holds an flock on `.NAME.lock`, and every
process that reads it one on the file itself. The system releases these locks however a process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stage_trainer.errors import UserError

_FOLDER = re.compile(r".*@[0-9a-f]{16}")  # of a data set; nothing outside such folders is ever removed
_COPY = re.compile(r"[^.].*\.(tar|index\.jsonl|npy)")
_PART = re.compile(r"\.(?P<name>.+)-(?P<size>\d+)\.part")


def part_name(name: str, size: int) -> str:
    """A file's name while it is fetched. It states the final size, which counts against the limit from the start."""
    return f".{name}-{size}.part"


class CacheFolder:
    """The folder for copies, with a limit.

    Args:
        cache: the folder.
        gigabytes: limit of all its files together; None for no limit.
    """

    def __init__(self, cache: Path, gigabytes: float | None):
        self.cache, self.limit = cache, None if gigabytes is None else gigabytes * 1e9

    def reserve(self, part: Path, size: int) -> bool:
        """Creates the empty `part`, which counts as `size` bytes from now on, and makes space for it by evicting the
        least recently read files that no process has open. False if that was not enough; `part` is created anyway."""
        with self._locked():
            fits = self.limit is None or self._clear(self.limit - size)
            part.touch()
            return fits

    def clear(self) -> bool:
        """Removes all files that no process has open; whether there were any."""
        with self._locked():
            before = sum(size for _, size, _ in self._copies())
            self._clear(0)
            return sum(size for _, size, _ in self._copies()) < before

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.cache / ".lock")

    def _clear(self, limit: float) -> bool:
        copies = sorted(self._copies())
        used = sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if used <= limit:
                break
            if _remove_unused(path):
                used -= size
        return used <= limit

    def _copies(self) -> Iterator[tuple[float, int, Path]]:
        """(time of the last read, bytes, path) of each copy that is complete or being fetched."""
        for folder, _, names in os.walk(self.cache):
            if not _FOLDER.fullmatch(os.path.basename(folder)):
                continue
            for name in names:
                part = _PART.fullmatch(name)
                if part or _COPY.fullmatch(name):
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        found = path.stat()
                        yield found.st_mtime, int(part["size"]) if part else found.st_size, path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, which is removed afterwards."""
    while True:
        try:
            file = path.open("wb")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name another remote.cache") from error
        with file:
            _lock(file, path, fcntl.LOCK_EX)
            if not _is(path, file):  # its former holder has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def try_lock(path: Path) -> IO[bytes] | None:
    """A lock file, held until it is closed; None if another process holds it."""
    try:
        file = path.open("wb")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another remote.cache") from error
    try:
        _lock(file, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _lock(file: IO[bytes], path: Path, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:  # two processes would remove each other's copies
        raise UserError(
            f"{path.parent}: this file system has no locks ({error.strerror}); name a folder on another one as "
            "remote.cache"
        ) from error


def _remove_unused(path: Path) -> bool:
    """Removes a copy that no process reads, or a partial file that a killed one left."""
    part = _PART.fullmatch(path.name)
    guard = path.with_name(f".{part['name']}.lock") if part else path
    with contextlib.suppress(OSError):  # in use, already removed, or another user's
        if part and not guard.exists():
            path.unlink()
            return True
        with guard.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    return False


def _is(path: Path, file: IO[bytes]) -> bool:
    """Whether `path` still names this open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
