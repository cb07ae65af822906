"""Reading a data set: any sample by its number, from any thread, without unpacking or scanning a tar."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .format import MANIFEST, SCHEMA, ShardError, check_kind, index_name

# Indexes and open files of so many shards are kept; more would run into the usual limit of 1,024 open files.
_SHARDS_KEPT = 128


@dataclass(frozen=True)
class Row:
    """One line of a sidecar: where a sample lies and what is known of it without reading it."""

    key: str
    members: dict[str, tuple[int, int]]  # extension -> offset and size of the data in the tar, in bytes
    languages: tuple[str, ...]
    tokens: int | None  # of its longest text; None if nobody counted
    sha256: str  # of the members' bytes, in order
    shard: str  # name of the tar


class Dataset:
    """A data set on the disk, opened by `Dataset.open(directory)`.

    Attributes:
        directory, kind, source: where it is, which of `KINDS`, the name of its source.
        fingerprint: sha256 of the manifest's bytes; two data sets with the same one hold the same samples.
        manifest: the manifest, as parsed.
        shard_sizes: samples in each shard, in order.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], fingerprint: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.kind: str = manifest["kind"]
        self.source: str = manifest["source"]
        self.fingerprint = fingerprint
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
        raw = _read_manifest(directory)
        manifest = _parse_manifest(directory / MANIFEST, raw)
        for shard in manifest["shards"]:
            tar = directory / shard["name"]
            _check_file(tar, shard["bytes"], shard["sha256"] if verify else None)
            index = directory / index_name(shard["name"])
            _check_file(index, shard["index_bytes"], shard["index_sha256"] if verify else None)
        return cls(directory, manifest, hashlib.sha256(raw).hexdigest())

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
        """
        number, place = self._locate(index)
        shard = self._shard(number)
        row = shard.rows[place]
        digest = hashlib.sha256()
        members = {}
        for extension, (offset, size) in row.members.items():
            try:
                data = shard.read(offset, size)
            except OSError as error:
                raise ShardError(f"{shard.path}: sample {row.key!r} cannot be read ({error.strerror})") from error
            digest.update(data)
            members[extension] = data
        if digest.hexdigest() != row.sha256:
            raise ShardError(f"{shard.path}: sample {row.key!r} is damaged (its bytes differ from the sidecar's hash)")
        return members

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
            shard = _Shard(self.directory / entry["name"], entry["samples"])
            self._open_shards[number] = shard
            if len(self._open_shards) > _SHARDS_KEPT:
                self._open_shards.popitem(last=False)  # closed when the last thread that reads from it lets go
            return shard


class _Shard:
    """One open tar and its parsed sidecar."""

    def __init__(self, path: Path, samples: int) -> None:
        self.path = path
        index = path.with_name(index_name(path.name))
        try:
            lines = index.read_text(encoding="utf-8").splitlines()
            self.rows = [_row(line, path.name) for line in lines]
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ShardError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{index}: not a sidecar of {SCHEMA} ({error}); build the data set again") from error
        if len(self.rows) != samples:
            raise ShardError(
                f"{index}: has {len(self.rows)} samples, the manifest says {samples}; build the data set again"
            )

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; the file's own position is not used, so threads do not disturb one another."""
        return os.pread(self._file.fileno(), size, offset)


def _row(line: str, shard: str) -> Row:
    entry = json.loads(line)
    return Row(
        key=entry["key"],
        members={extension: (offset, size) for extension, (offset, size) in entry["members"].items()},
        languages=tuple(entry["languages"]),
        tokens=entry["tokens"],
        sha256=entry["sha256"],
        shard=shard,
    )


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


def _parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
        schema = manifest["schema"]
        if schema != SCHEMA:
            raise ShardError(f"{path}: schema {schema!r}, expected {SCHEMA!r}; build the data set again")
        check_kind(manifest["kind"])
        for shard in manifest["shards"]:
            for field in ("name", "samples", "bytes", "sha256", "index_bytes", "index_sha256"):
                shard[field]
        if manifest["samples"] != sum(shard["samples"] for shard in manifest["shards"]):
            raise ShardError(
                f"{path}: its shards do not add up to {manifest['samples']} samples; build the data set again"
            )
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a manifest of {SCHEMA} ({error!r}); build the data set again") from error
    return manifest


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
