"""Existing webdataset tars: samples with the offsets of their members, also from damaged files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.shards.format import parse_json
from data_prep.sources.records import Dropped

CUT = "rest of a tar that is cut short or damaged"


@dataclass(frozen=True)
class TarSample:
    """Consecutive members that share a name up to its first dot; by extension, (offset, size) of the data."""

    name: str
    members: dict[str, tuple[int, int]]
    file: IO[bytes]

    def read(self, extension: str) -> bytes:
        offset, size = self.members[extension]
        return os.pread(self.file.fileno(), size, offset)

    def json(self) -> Any:
        """Its parsed .json; {} without one, None if that is no JSON."""
        try:
            return parse_json(self.read("json")) if "json" in self.members else {}
        except ValueError:
            return None


def tar_samples(path: Path) -> Iterator[TarSample | Dropped]:
    """The samples of an uncompressed tar, in order.

    What precedes a damaged place is yielded; the rest of the file is one `Dropped`. Nothing is unpacked or unpickled.
    UserError if the file cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    with file:
        name, members = "", dict[str, tuple[int, int]]()
        for member in _members(path, file):
            if isinstance(member, Dropped):
                yield member
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            full = f"{folder}/{stem}" if folder else stem
            if full != name:
                if members:
                    yield TarSample(name, members, file)
                name, members = full, {}
            if extension.lower() in members:
                yield Dropped("second member of one name", f"{path.name}: {member.name}")
            else:
                members[extension.lower()] = (member.offset_data, member.size)
        if members:
            yield TarSample(name, members, file)


def _members(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo | Dropped]:
    """The regular files of a tar; what follows a damaged place is one `Dropped` at the end."""
    size = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it borrows the file
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all in memory
            if member.isdir():
                continue
            if not member.isfile():
                yield Dropped("a link or device in a tar", f"{path.name}: {member.name}")
            elif member.name.startswith("/") or ".." in member.name.split("/"):
                yield Dropped("a name that leads out of the tar", f"{path.name}: {member.name}")
            elif member.offset_data + member.size > size:
                break
            else:
                yield member
        # tarfile mistakes a broken header for the end of the archive; the real end is a block of zeros.
        whole = member is None and os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError, OverflowError):
        whole = False
    if not whole:
        yield Dropped(CUT, path.name)
