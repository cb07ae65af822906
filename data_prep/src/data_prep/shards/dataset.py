"""Reading a data set: any sample by its number, from any thread, without unpacking or scanning a tar."""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import os
import string
import threading
from collections import OrderedDict
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from data_prep.shards.content import with_named_captions
from data_prep.shards.format import (
    MANIFEST,
    SCHEMA,
    JsonObject,
    ShardError,
    ShardUnavailable,
    check_kind,
    index_name,
    parse_json,
)

# Shards whose index and file stay open; the usual limit of a process is 1,024 open files.
_SHARDS_KEPT = 128


@dataclass(frozen=True)
class Row:
    """One line of a sidecar: where a sample is and what is known without reading it."""

    key: str
    members: dict[str, tuple[int, int]]  # extension -> offset and size of the data in the tar, in bytes
    languages: tuple[str, ...]
    tokens: int | None  # of its longest text; None if not counted
    sha256: str  # of the members' bytes, in order
    shard: str  # name of the tar

    @property
    def item(self) -> str:
        """The identity of a sample that states none; with the tar, as those of others may each count from 0."""
        return f"{self.shard}/{self.key}"


class Dataset:
    """A data set on the disk, opened by `Dataset.open(directory)`.

    A data set elsewhere (object storage) subclasses this and overrides `open_file`.

    Args:
        directory: its folder.
        raw: the bytes of its manifest.

    Attributes:
        directory, kind, source: where it is, which of `KINDS`, the name of its source.
        fingerprint: sha256 of the manifest's bytes; two data sets with the same one hold the same samples.
        manifest: the manifest, as parsed.
        shard_sizes: samples in each shard, in order.
    """

    def __init__(self, directory: Path, raw: bytes) -> None:
        self.directory = directory
        self.manifest = manifest = _parse_manifest(directory / MANIFEST, raw)
        self.kind: str = manifest["kind"]
        self.source: str = manifest["source"]
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.shard_sizes: tuple[int, ...] = tuple(shard["samples"] for shard in manifest["shards"])
        self._starts = [0, *itertools.accumulate(self.shard_sizes)]
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, verify: bool = False) -> Dataset:
        """Open a data set after checking that it is whole.

        Args:
            directory: the folder that holds `manifest.json`.
            verify: also read every file and compare its checksum; without it, sizes are compared.

        Raises:
            ShardError: the manifest, a shard or a sidecar is missing, cut short, of another schema or (verify) damaged.
        """
        directory = Path(directory)
        data = cls(directory, _read_manifest(directory))
        for shard in data.manifest["shards"]:
            tar = directory / shard["name"]
            _check_file(tar, shard["bytes"], shard["sha256"] if verify else None)
            index = directory / index_name(shard["name"])
            _check_file(index, shard["index_bytes"], shard["index_sha256"] if verify else None)
        return data

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Row:
        """What the sidecar says of sample `index` (from 0, in shard order). IndexError outside the data set."""
        number, place = self._locate(index)
        return self._shard(number).rows[place]

    def read(self, index: int) -> dict[str, bytes]:
        """The members of sample `index` by extension, e.g. {"png": b"…", "json": b"…"}; their hash is checked.

        Raises:
            ShardError: the sample cannot be read or is not what the sidecar says; names shard and key.
            ShardUnavailable: nothing of its shard can be read.
        """
        number, place = self._locate(index)
        shard = self._shard(number)
        row = shard.rows[place]
        tar = self._tar(shard)  # this reference keeps it open
        digest = hashlib.sha256()
        members = {}
        for extension, (offset, size) in row.members.items():
            try:
                # pread does not use the file's position, so threads do not disturb one another.
                members[extension] = data = os.pread(tar.fileno(), size, offset)
            except OSError as error:
                raise ShardError(f"{shard.path}: sample {row.key!r} cannot be read ({error.strerror})") from error
            digest.update(data)
        if digest.hexdigest() != row.sha256:
            raise ShardError(f"{shard.path}: sample {row.key!r} is damaged (its bytes differ from the sidecar's hash)")
        names = self.manifest["shards"][number].get("caption_keys")  # of a .json that is not of the format
        return with_named_captions(self.kind, members, names) if names else members

    def name(self, index: int) -> tuple[str, str]:
        """(tar, key) of sample `index`, for messages; where the sidecar cannot be read the key is "#" and its place."""
        number, place = self._locate(index)
        try:
            key = self._shard(number).rows[place].key
        except ShardError:
            key = f"#{place}"
        return self.manifest["shards"][number]["name"], key

    def shard_of(self, index: int) -> int:
        """The number of the shard that sample `index` is in."""
        return self._locate(index)[0]

    def samples_of(self, number: int) -> range:
        """The numbers of the samples in shard `number`."""
        return range(self._starts[number], self._starts[number + 1])

    def open_file(self, name: str) -> FileIO:
        """A tar or sidecar, opened for reading without a buffer.

        Raises:
            OSError, ShardUnavailable: it cannot be opened.
        """
        return (self.directory / name).open("rb", buffering=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.open, (self.directory,)  # a worker process opens its own files

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.directory}, which has {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            if number in self._open_shards:
                self._open_shards.move_to_end(number)
                return self._open_shards[number]
            entry = self.manifest["shards"][number]
            path = self.directory / entry["name"]
            shard = self._open_shards[number] = _Shard(path, self._rows(path, entry))
            if len(self._open_shards) > _SHARDS_KEPT:
                self._open_shards.popitem(last=False)  # closed once no thread reads from it
            return shard

    def _rows(self, tar: Path, entry: JsonObject) -> list[Row]:
        index, samples = tar.with_name(index_name(tar.name)), entry["samples"]
        try:
            with self.open_file(index.name) as file:
                raw = file.read()
        except OSError as error:
            _raise_if_the_process_is_short(error)
            raise ShardUnavailable(f"{index}: cannot be read ({error.strerror})") from error
        if (
            hashlib.sha256(raw).hexdigest() != entry["index_sha256"]
        ):  # or samples would be others, and nobody would know
            raise ShardUnavailable(f"{index}: checksum differs from the manifest's: damaged; build the data set again")
        try:
            # Of bytes: a text's `splitlines` also splits at U+0085 and U+2028, inside names.
            rows = [_row(line, tar.name, entry["bytes"]) for line in raw.splitlines()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ShardUnavailable(
                f"{index}: not a sidecar of {SCHEMA} ({_why(error)}); build the data set again"
            ) from error
        if len(rows) != samples:
            raise ShardUnavailable(
                f"{index}: has {len(rows)} samples, the manifest says {samples}; build the data set again"
            )
        return rows

    def _tar(self, shard: _Shard) -> FileIO:
        with shard.lock:
            if shard.tar is None:
                try:
                    shard.tar = self.open_file(shard.path.name)
                except OSError as error:
                    _raise_if_the_process_is_short(error)
                    raise ShardUnavailable(f"{shard.path}: cannot be read ({error.strerror})") from error
            return shard.tar


class _Shard:
    """A parsed sidecar, and its tar once it is open."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path, self.rows = path, rows
        self.tar: FileIO | None = None
        self.lock = threading.Lock()


def _raise_if_the_process_is_short(error: OSError) -> None:
    """Raises what is no fault of the data: a process that may open no more files would pass all of them over."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise error


def _row(line: bytes, shard: str, size: int) -> Row:
    """A line of the sidecar of a tar of `size` bytes. KeyError, TypeError, ValueError, RecursionError if it is none."""
    entry = parse_json(line)
    members = {name: (_count(start), _count(length)) for name, (start, length) in entry["members"].items()}
    for name, (start, length) in members.items():
        if start + length > size:
            raise ValueError(f"member {name} ends at byte {start + length:,} of a tar of {size:,}")
    if not isinstance(entry["languages"], list):
        raise TypeError(f"languages are {shown(entry['languages'])}, expected a list")
    return Row(
        key=_text(entry["key"]),
        members=members,
        languages=tuple(map(_text, entry["languages"])),
        tokens=None if entry["tokens"] is None else _count(entry["tokens"]),
        sha256=_hash(entry["sha256"]),
        shard=shard,
    )


def shown(value: object) -> str:
    """A foreign value, short enough for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(value: object) -> int:
    """A number of samples or bytes, as JSON's readers in other languages can hold it."""
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{shown(value)}, expected a whole number from 0 to 2^53")
    return value


def _text(value: object) -> str:
    """A key, an extension, a language: as foreign tars have them, so perhaps not UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)}, expected a text")
    return value


def _name(value: object) -> str:
    """A name that becomes a path, or is looked up."""
    if not (name := _text(value)) or not name.isprintable():
        raise ValueError(f"{shown(name)}, expected a name of printable characters")
    return name


def _hash(value: object) -> str:
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set(string.hexdigits):
        raise ValueError(f"{shown(value)}, expected a sha256 of 64 hex digits")
    return value


def _read_manifest(directory: Path) -> bytes:
    try:
        return (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        pass
    if not directory.is_dir():
        raise ShardError(f"{directory}: no such data set; build it first (`data-prep corpus OUT`)")
    raise ShardError(
        f"{directory / MANIFEST}: missing, so this is no finished data set; remove {directory} and build it again"
    )


def _parse_manifest(path: Path, raw: bytes) -> JsonObject:
    """The manifest, in which every field that is read later has its type. ShardError if it is none."""
    try:
        manifest: JsonObject = parse_json(raw)
        if manifest["schema"] != SCHEMA:
            raise ShardError(
                f"{path}: schema {shown(manifest['schema'])}, expected {SCHEMA!r}; build the data set again"
            )
        check_kind(_name(manifest["kind"]))
        _name(manifest["source"])
        names = set()
        for shard in manifest["shards"]:
            for field, check in _SHARD_FIELDS.items():
                check(shard[field])
            list(map(_name, shard.get("caption_keys", ())))
            name = shard["name"]
            if Path(name).name != name or name == "..":
                raise ShardError(f"{path}: names the shard {name!r}, which would lie outside of the data set")
            if name in names:
                raise ShardError(f"{path}: lists the shard {name!r} twice; build the data set again")
            names.add(name)
        if _count(manifest["samples"]) != sum(shard["samples"] for shard in manifest["shards"]):
            raise ShardError(
                f"{path}: its shards do not add up to {manifest['samples']} samples; build the data set again"
            )
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a manifest of {SCHEMA} ({_why(error)}); build the data set again") from error
    return manifest


_SHARD_FIELDS = {
    "name": _name,
    "samples": _count,
    "bytes": _count,
    "sha256": _hash,
    "index_bytes": _count,
    "index_sha256": _hash,
}


def _why(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _check_file(path: Path, size: int, sha256: str | None) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise ShardError(
                f"{path}: has {found} bytes, the manifest says {size}: half written? Build the data set again"
            )
        if sha256 is not None:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ShardError(f"{path}: checksum differs from the manifest's: damaged; build the data set again")
    except FileNotFoundError as error:
        raise ShardError(f"{path}: missing, though the manifest lists it; build the data set again") from error
