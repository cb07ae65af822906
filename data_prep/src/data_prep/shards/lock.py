"""A lock file, for work that one process at a time may do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from data_prep.shards.format import ShardError

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class InUse(ShardError):
    """Another process holds a lock file."""


@contextlib.contextmanager
def alone(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is removed afterwards. The system releases the lock when the process ends,
    however it ends, so a file left by a killed process blocks nobody.

    It is a record lock (fcntl, POSIX): machines that share the folder see it, and forked children, which may outlive
    this process, do not inherit it. Threads of one process do not exclude each other. On a file system without locks
    a warning is printed and the work goes on.

    Args:
        path: created, with its parent folders.
        what: is in use, for the message ("the run's folder runs/a").
        wait: until the lock is free, instead of raising.

    Raises:
        InUse: another process holds it.
        OSError: the file cannot be written.
    """
    file = _acquire(path, what, wait)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(
                missing_ok=True
            )  # before the release: a waiting process checks that the file is still there (`_is`)
            file.close()


def _acquire(path: Path, what: str, wait: bool) -> FileIO | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+b", buffering=0)  # or a full disk would be met once more where the file is closed
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
                raise OSError(error.errno, error.strerror, str(path)) from error
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
        file.close()  # the previous holder removed it
    with contextlib.suppress(OSError):  # the note is not needed: a full disk must not stop the work
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    return file


def _read(file: FileIO) -> str:
    with contextlib.suppress(OSError):
        file.seek(0)
        return file.read(200).decode("utf-8", "replace").strip()
    return ""


def _is(path: Path, file: FileIO) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
