"""Directories and files that appear complete or not at all, even after a power cut; digests of what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.shards import InUse, alone, sync, write_file
from safetensors import SafetensorError

from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_OF_A_MODEL = (".json", ".safetensors", ".model", ".bin", ".pt", ".txt")


@contextlib.contextmanager
def whole_directory(target: str | Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside `target`, and renames it to `target` if the body does not raise.

    Its content is flushed to disk before the rename, so that a power cut leaves the complete directory or none.

    Raises:
        UserError: `target` exists, another process is writing it, or it cannot be written (nothing is left behind).
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} exists already; name another place or move it away")
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with alone(target.with_name(f".{target.name}.lock"), f"{target} is being written: it"):
            if target.exists():  # another process was faster
                raise UserError(f"{target} exists already; name another place or move it away")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            temporary.rename(target)
            sync(target.parent)
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
    """Writes a text file; the former one stays until the new one is complete and on the disk.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(target)
    with writing(target):
        write_file(target, text.encode())
        sync(target.parent)


def check_can_write(target: Path) -> None:
    """Finds out, before the work rather than after it, whether a file or directory of that name can be written: makes
    one beside it, under a name as long as the temporary ones, and removes it.

    Raises:
        UserError: it cannot.
    """
    with writing(target):
        missing = [parent for parent in target.parents if not parent.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            probe = target.with_name(f"{target.name}.{os.urandom(6).hex()}.tmp")  # as `write_file` names them
            probe.mkdir()
            probe.rmdir()
        finally:
            with contextlib.suppress(OSError):
                for parent in missing:
                    parent.rmdir()


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns an OSError inside into a UserError that names `target`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not write {target}: {error.strerror or error}; free some space or name another place"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a mapping, found {type(found).__name__}")
    return found


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the umask's permissions; by itself safetensors lets only the owner read it."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def free_name(path: Path, word: str) -> Path:
    """An unused name beside `path`: `NAME.WORD-1`, or with the next free number."""
    number = 1
    while (free := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return free


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digests(folder: Path) -> dict[str, str]:
    """{name within the folder: sha256} of a model's weights, configuration and tokenizer; not of hidden folders."""
    within = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.suffix in _OF_A_MODEL}
    shown = {name: path for name, path in within.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): sha256(path) for name, path in shown.items() if path.is_file()}


def fingerprint_of(folder: Path) -> str:
    """sha256 of a model's weights, configuration and tokenizer, by their names in the folder and their content."""
    lines = (f"{name}\0{content}\n" for name, content in model_digests(folder).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
