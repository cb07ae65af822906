"""Directories and files that exist whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.shards import InUse, alone
from safetensors import SafetensorError

from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def whole_directory(target: str | Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside `target`; renames it to `target` once the body has ended well.

    What the body wrote is flushed to disk before the rename, so that a power cut leaves the whole directory or none.

    Raises:
        UserError: `target` exists, another process is writing it, or the disk took no more (nothing is left behind,
            nothing else was touched).
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} exists already; name another place or move it away")
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with alone(target.with_name(f".{target.name}.lock"), f"{target} is being written: it"):
            if target.exists():  # meanwhile
                raise UserError(f"{target} exists already; name another place or move it away")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                _fsync(path)
            temporary.rename(target)
            _fsync(target.parent)
    except InUse:
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"could not write {target}: {reason}; free some space or name another place") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(target: str | Path, text: str) -> None:
    """Writes a text file; what stood there before stays until the new one is whole.

    Raises:
        UserError: the disk took no more, or the place cannot be written.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")  # another process has its own
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        temporary.replace(target)
        _fsync(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not write {target}: {error.strerror}; free some space or name another place") from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that whoever the umask allows can read; safetensors' own are for the owner alone."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def free_name(path: Path, word: str) -> Path:
    """A name beside `path` that nothing has: `NAME.WORD-1`, or the next number."""
    number = 1
    while (free := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return free


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
