"""Rank 0 sends to the other ranks: a value, or a checkpoint where machines do not share the run's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stage_trainer.files import free_name, whole_directory

_PIECE = 64 * 2**20
"""Bytes that travel at a time."""


def from_rank_0(value: Any) -> Any:
    """The value that rank 0 has; a rank that cannot read or write must not leave the others waiting for it."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def copy_to_other_machines(checkpoint: Path) -> None:
    """Sends rank 0's checkpoint to every machine that lacks it, or has another one under its name; all ranks call it.

    The first rank of each machine (LOCAL_RANK 0) checks and receives. With a shared folder nothing is sent.

    Raises:
        UserError: a machine's disk is full.
    """
    if dist.get_world_size() == 1:
        return
    here = _digest(checkpoint)
    digest, files = from_rank_0((here, _files(checkpoint)) if dist.get_rank() == 0 else None)
    lacks = os.environ.get("LOCAL_RANK", "0") == "0" and here != digest
    wanted: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(wanted, lacks)
    if any(wanted):
        if lacks and checkpoint.exists():
            checkpoint.rename(free_name(checkpoint, "other"))
        with whole_directory(checkpoint) if lacks else contextlib.nullcontext(checkpoint) as directory:
            for name, size in files:
                _send(directory / name, size, lacks)
        dist.barrier()


def _send(file: Path, size: int, receive: bool) -> None:
    """One file, piece by piece, from rank 0 to all ranks; those with `receive` write it."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    with contextlib.ExitStack() as opened:
        source = opened.enter_context(file.open("rb")) if dist.get_rank() == 0 else None
        if receive:
            file.parent.mkdir(parents=True, exist_ok=True)
        target = opened.enter_context(file.open("wb")) if receive else None
        for start in range(0, size, _PIECE):
            content = bytearray(min(_PIECE, size - start))
            if source is not None:
                source.readinto(content)
            piece = torch.frombuffer(content, dtype=torch.uint8).to(device)
            dist.broadcast(piece, src=0)
            if target is not None:
                target.write(piece.cpu().numpy().tobytes())


def _files(checkpoint: Path) -> list[tuple[str, int]]:
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [(path.relative_to(checkpoint).as_posix(), path.stat().st_size) for path in found]


def _digest(checkpoint: Path) -> str | None:
    """Of state.json, which holds the hash of every other file; None if there is none."""
    try:
        return hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
    except OSError:
        return None
