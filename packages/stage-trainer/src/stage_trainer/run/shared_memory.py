"""How much of /dev/shm the pieces that workers have ready may take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

from stage_trainer.data.pieces import BatchesInPieces
from stage_trainer.errors import UserError

BATCHES_AHEAD = 2
"""So many batches are under way, where a batch has several pieces."""
_SMALL = 4
"""Pieces under way for each worker, where a batch is one piece."""
_RESERVE = 1.25
"""The share that ranks may take beyond what their pieces sum up to: pages, and a piece that is just being copied."""
_HOW = "Docker: --shm-size or --ipc=host; elsewhere: mount -o remount,size=… /dev/shm"


def pieces_ahead(data: BatchesInPieces[Any], step: int, workers: int, say: Callable[[str], None]) -> int:
    """How many pieces each worker has ready or in work, so that all ranks of this machine fit into shared memory.

    Args:
        step: whose batch is as large as any.
        say: gets a line if there is less room than wanted.

    Raises:
        UserError: there is not even room for one piece of each worker.
    """
    count, size = data.pieces(step), data.piece_bytes(step)
    wanted = _SMALL if count == 1 else max(2, -(-BATCHES_AHEAD * count // workers))
    free = _free()
    if not size or free is None:
        return wanted
    ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    of_one = ranks * workers * size * _RESERVE
    if free >= wanted * of_one:
        return wanted
    there = (
        f"shared memory (/dev/shm) has {_mib(free)} free, and {workers} workers for each of {ranks} ranks want "
        f"{_mib(wanted * of_one)} to keep {BATCHES_AHEAD} batches ahead"
    )
    if free < of_one:
        raise UserError(f"{there}, {_mib(of_one)} at least; give it more ({_HOW}), or lower workers (now {workers})")
    say(f"{there}; they keep less ahead, so steps may wait for data: give it more ({_HOW})")
    return int(free // of_one)


def _free() -> int | None:
    """Bytes; None where shared memory is not a folder."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
