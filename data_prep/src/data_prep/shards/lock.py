"""One process at a time where two would spoil each other's work."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_prep.shards.format import ShardError

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class InUse(ShardError):
    """Another process holds a lock file."""


@contextlib.contextmanager
def alone(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, which is gone afterwards. The lock itself goes with the process that holds it,
    however that ends; a file that a killed process leaves holds nobody up.

    It is the system's record lock (fcntl, POSIX): other machines that share the folder see it, too, and processes that
    this one forks do not inherit it, so none that outlives this one keeps it. Threads of one process do not exclude
    each other. Where a file system has no locks this is said, and the work goes on.

    Args:
        path: made with the folders above it.
        what: that is in use, for the message ("the run's folder runs/a").
        wait: for the process that holds it, instead of raising.

    Raises:
        InUse: another process holds it.
        OSError: the file cannot be written.
    """
    file = _acquire(path, what, wait)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is held: whoever waits for it looks whether it is still this file
            file.close()


def _acquire(path: Path, what: str, wait: bool) -> IO[str] | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            holder = _read(file)
            file.close()
            if error.errno in _HELD:
                raise InUse(
                    f"{what} is in use by {holder or 'another process'}; wait until that has ended, stop it, or name "
                    "another place"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            print(
                f"{path.parent}: this file system has no locks ({error.strerror}), so it goes unseen if another "
                "process writes there as well",
                file=sys.stderr,
                flush=True,
            )
            return None
        if _is(path, file):
            break
        file.close()  # whoever held it has removed it
    with contextlib.suppress(OSError):  # a full disk holds nobody up
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    return file


def _read(file: IO[str]) -> str:
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        return file.read(200).strip()
    return ""


def _is(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
