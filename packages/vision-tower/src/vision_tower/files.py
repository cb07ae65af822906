"""JSON files, and directories that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_json(content: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    file.touch()  # safetensors makes files that only their owner may read: this one gets the umask's mode
    mode = file.stat().st_mode
    save_file(on_host, file, {"format": "pt"})
    file.chmod(mode)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; what the body wrote is on disk before anything at `path` changes.

    A new or empty `path` then appears in one step. Otherwise each file replaces its namesake; others stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}.partial")
    building.mkdir()
    try:
        yield building
        for written in [*building.rglob("*"), building]:
            sync(written)
        if path.is_dir() and any(path.iterdir()):
            for written in building.iterdir():
                written.replace(path / written.name)
            building.rmdir()
            sync(path)
        else:
            building.replace(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file, or a directory's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
