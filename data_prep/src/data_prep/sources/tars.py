"""Existing webdataset tars: samples with the offsets of their members, also from damaged files.

Tars of others have what their tools left there: members of one sample far apart, dots in names, macOS's ._ members.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.names import is_hidden
from data_prep.shards.format import IMAGE_TYPES, parse_json
from data_prep.sources.records import Dropped, Noted

CUT = "rest of a tar that is cut short or damaged"
_HIDDEN = "hidden members passed over (._NAME, .DS_Store, __MACOSX)"
_UNREAD = "further images and texts of a sample, not read"
_LARGEST = 256 * 2**20  # bytes of a member that is read; no photograph, page or text has more
_TEXTS = ("json", "txt")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}

_Place = tuple[int, int]  # offset and size of a member's data, in bytes


@dataclass(frozen=True)
class TarSample:
    """Members that share a name; by extension, (offset, size) of the data."""

    name: str
    members: dict[str, _Place]
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


def tar_samples(path: Path) -> Iterator[TarSample | Dropped | Noted]:
    """The samples of an uncompressed tar, in the order of their first members.

    A name ends at its first dot, as in webdataset. Where it then has no image or text of its own, or where a longer
    name has both ("a.b.jpg" and "a.b.txt"), names end at the last dot.

    What precedes a damaged place is yielded; the rest of the file is one `Dropped`. Nothing is unpacked or unpickled.
    UserError if the file cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    with file:
        groups: dict[str, dict[str, _Place]] = {}
        torn: set[str] = set()
        for run in _runs(tar_members(path, file), path.name):
            if not isinstance(run, tuple):
                yield run
                continue
            name, members = run
            group = groups.setdefault(name, {})
            if name in torn or group.keys() & members.keys() or (_images(group) and _images(members)):
                torn.add(name)  # whose image is whose caption's can no longer be told
                yield Dropped("second sample of one name", f"{path.name}: {name}")
            else:
                group |= members
        for name, group in groups.items():
            for sample, members in _samples(name, group):
                if unread := len(_known(members)) - bool(_images(members)) - sum(text in members for text in _TEXTS):
                    yield Noted(_UNREAD, unread)
                yield TarSample(sample, members, file)


def _runs(
    members: Iterable[tarfile.TarInfo | Dropped | Noted], tar: str
) -> Iterator[tuple[str, dict[str, _Place]] | Dropped | Noted]:
    """(name up to the first dot, members by what follows it) of members that stand together."""
    name, run = "", dict[str, _Place]()
    for member in members:
        if not isinstance(member, tarfile.TarInfo):
            yield member
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, rest = base.partition(".")
        middle, dot, extension = rest.rpartition(".")
        full, extension = f"{folder}/{stem}" if folder else stem, f"{middle}{dot}{extension.lower()}"
        if full != name:
            if run:
                yield name, run
            name, run = full, {}
        if extension in run:
            yield Dropped("second member of one name", f"{tar}: {member.name}")
        else:
            run[extension] = (member.offset_data, member.size)
    if run:
        yield name, run


def _samples(name: str, members: dict[str, _Place]) -> Iterator[tuple[str, dict[str, _Place]]]:
    """(name, members by extension) of the samples among members that share a name up to the first dot."""
    parts: dict[str, dict[str, _Place]] = {}
    for ending, place in members.items():
        middle, _, extension = ending.rpartition(".")
        parts.setdefault(middle, {})[extension] = place
    base = parts.pop("", {})
    own = {
        middle: part
        for middle, part in parts.items()
        if (_known(part) and not _known(base)) or (_images(part) and any(text in part for text in _TEXTS))
    }
    if _known(base) or not own:
        others = {ending: place for ending, place in members.items() if ending.rpartition(".")[0] not in own}
        yield name, others
    for middle, part in own.items():
        yield f"{name}.{middle}", part


def _images(members: Iterable[str]) -> list[str]:
    return [extension for extension in members if extension in IMAGE_TYPES]


def _known(members: Iterable[str]) -> list[str]:
    """The images and texts among members, also those with a dot before their extension."""
    return [ending for ending in members if ending.rpartition(".")[2] in (*IMAGE_TYPES, *_TEXTS)]


def tar_members(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo | Dropped | Noted]:
    """The regular files of a tar, also of further ones behind its end (tars that were joined by `cat`).

    What follows a damaged place is one `Dropped` at the end.
    """
    start = os.pread(file.fileno(), 6, 0)
    if packed := next((name for mark, name in _PACKED.items() if start.startswith(mark)), None):
        yield Dropped("a packed tar, which has no offsets: unpack it", f"{path.name} ({packed})")
        return
    if not start:
        yield Dropped("an empty file in place of a tar", path.name)
        return
    place: int | None = 0
    while place is not None:
        file.seek(place)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it borrows the file
        except (tarfile.TarError, ValueError, OverflowError):
            yield Dropped(CUT if place else "a file that is no tar", path.name)
            return
        if not (yield from _members(tar, path.name, file)):
            yield Dropped(CUT, path.name)
            return
        place = _next_archive(file, tar.offset)


def _members(
    tar: tarfile.TarFile, name: str, file: IO[bytes]
) -> Generator[tarfile.TarInfo | Dropped | Noted, None, bool]:
    """The regular files up to the end of an archive; returns whether it has one.

    A hard link, as tar stores a file's second name, is what stands under the first.
    """
    size, places = os.fstat(file.fileno()).st_size, dict[str, _Place]()
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all in memory
            if member.isdir():
                continue
            if member.islnk() and member.linkname in places:
                member.type, (member.offset_data, member.size) = tarfile.REGTYPE, places[member.linkname]
            if is_hidden(member.name):
                yield Noted(_HIDDEN)
            elif reason := _refused(member):
                yield Dropped(reason, f"{name}: {member.name}")
            elif member.offset_data + member.size > size:
                return False
            else:
                places[member.name] = member.offset_data, member.size
                yield member
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    # tarfile mistakes a broken header for the end of the archive; the real end is a block of zeros.
    return os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) == bytes(tarfile.BLOCKSIZE)


def _next_archive(file: IO[bytes], place: int) -> int | None:
    """The first block after `place` that is not all zeros; None if there is none."""
    while block := os.pread(file.fileno(), 2**20, place):
        if rest := block.lstrip(b"\0"):
            return place + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(block)
    return None


def _refused(member: tarfile.TarInfo) -> str | None:
    """Why a member cannot be read by its offset and size."""
    if not member.isfile():
        return "a link or device in a tar"
    if member.issparse():
        return "a member stored with holes (tar --sparse)"
    if member.size > _LARGEST and _known([member.name.lower()]):
        return f"a member of over {_LARGEST // 2**20} MiB"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a name that leads out of the tar"
    return None
