"""Files that survive a crash: on the disk before anyone is told of them, whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from typing import IO

from .format import ShardError


class TarFile:
    """A ustar archive with nothing in it but names and bytes, hashed as it is written.

    Written by hand, the offset of every member's data is known at once. It grows beside its final place and takes its
    name at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary(path)
        self._file: IO[bytes] = self._temporary.open("wb")
        self._offset = 0
        self._digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> list[int]:
        """Append a member; returns [offset, size] of its data."""
        self._write(_header(name, len(data)))
        offset = self._offset
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return [offset, len(data)]

    def finish(self) -> tuple[int, str]:
        """Close the archive, on the disk under its name when this returns; gives its size and sha256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self.path)
        return self._offset, self._digest.hexdigest()

    def abandon(self) -> None:
        """Close and remove what is there so far."""
        with contextlib.suppress(OSError):  # what is still buffered may not fit the disk either; it is removed anyway
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _header(name: str, size: int) -> bytes:
    """A member's header, as `tarfile` would write it at ten times the cost."""
    raw = name.encode("ascii")
    if len(raw) > 100 or size >= 8**11:
        raise ShardError(f"{name}: of {size} bytes; a plain tar holds names of 100 characters and members of 8 GiB")
    header = bytearray(_EMPTY)
    header[: len(raw)] = raw
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # what stands here while the checksum is formed
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _empty_header() -> bytes:
    info = tarfile.TarInfo()  # time 0, owner 0, no owner names: nothing of this machine or hour gets in
    info.mode = 0o444
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


_EMPTY = _empty_header()


def temporary(path: Path) -> Path:
    """Where `path` grows; another process that makes the same file grows its own."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_file(path: Path, data: bytes) -> None:
    """Write a file, on the disk when this returns; whoever opens `path` finds the whole or what was there before."""
    growing = temporary(path)
    try:
        with growing.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        growing.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            growing.unlink()
        raise


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system can (Windows cannot open directories)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused(path: Path, error: OSError) -> ShardError:
    """What to say when the disk refuses."""
    reason = error.strerror or str(error)
    return ShardError(
        f"{path}: cannot be written ({reason}); make room or mend it and run again, nothing was published"
    )
