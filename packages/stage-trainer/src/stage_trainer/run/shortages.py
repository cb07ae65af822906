"""What to say when this machine gives a process no more file descriptors, or no more shared memory."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator

from stage_trainer.errors import UserError

NO_SHARED_MEMORY, NO_FILES = 101, 102
"""Exit codes of a worker that cannot hand over a batch; starting it again would not help."""


@contextlib.contextmanager
def shortages_explained() -> Iterator[None]:
    """Raises what too few file descriptors make fail as a UserError, whichever library met it.

    Not only workers: this process opens a file for each tensor that it gets, and sockets for each group of ranks.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if shortage(error) == NO_FILES:
            raise UserError(no_files()) from error
        raise


def shortage(error: Exception) -> int | None:
    """Which of the two an error is about, if any."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return NO_FILES
    if "Too many open files" in text or "items of ancdata" in text:  # the latter where they are received
        return NO_FILES
    return NO_SHARED_MEMORY if "shared memory" in text or "No space left" in text else None


def no_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"a process has no file descriptor left; it may have {soft:,}: raise that (`ulimit -n "
        f"{max(65_536, hard)}`), or lower workers"
    )


def no_shared_memory() -> str:
    room = shutil.disk_usage("/dev/shm").total / 2**20 if os.path.isdir("/dev/shm") else 0
    return (
        f"shared memory (/dev/shm, {room:,.0f} MiB) has no room for the next batch; raise it (of a container, "
        "--shm-size or --ipc=host), or lower workers or the batch"
    )
