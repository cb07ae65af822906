"""Reading a data set: any sample by its number, from any thread, without unpacking or scanning a tar."""

from __future__ import annotations

import bisect
import errno
import functools
import hashlib
import itertools
import os
import resource
import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from data_prep.shards.content import with_named_captions
from data_prep.shards.format import MANIFEST, SCHEMA_OF_LINES, JsonObject, ShardError, ShardUnavailable
from data_prep.shards.manifest import Manifest, Shard, why
from data_prep.shards.npy import Mapped, mapped
from data_prep.shards.sidecar import Row, rows_in, rows_of_lines


class Dataset:
    """A data set on the disk, opened by `Dataset.open(directory)`.

    A data set elsewhere (object storage) subclasses this and overrides `open_file`.

    Args:
        directory: its folder.
        raw: the bytes of its manifest.

    Attributes:
        directory, kind, source: where it is, which of `KINDS`, the name of its source.
        fingerprint: sha256 of the manifest's bytes; two data sets with the same one hold the same samples.
        shards: a table with a record a shard (see `Manifest`), which processes share; `shard` gives one of them.
    """

    def __init__(self, directory: Path, raw: bytes) -> None:
        self.directory = directory
        self._manifest = Manifest(directory / MANIFEST, raw, self._content)
        self.kind: str = self._manifest.head["kind"]
        self.source: str = self._manifest.head["source"]
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.shards = self._manifest.shards
        self._starts = array("q", [0, *itertools.accumulate(self.shards["samples"].tolist())])
        self._open_shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        _OPEN.add(self)

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, verify: bool = False, check: bool = True) -> Dataset:
        """Open a data set after checking that it is whole.

        Args:
            directory: the folder that holds `manifest.json`.
            verify: also read every file and compare its checksum; without it, sizes are compared.
            check: look at every file; without it only the manifest is read, and `Dataset.check` does the rest.

        Raises:
            ShardError: the manifest, a shard or a sidecar is missing, cut short, of another schema or (verify) damaged.
        """
        directory = Path(directory)
        data = cls(directory, _read_manifest(directory))
        if check or verify:
            data.check(verify=verify)
        return data

    def check(self, *, verify: bool = False) -> None:
        """Compare the size of every file with the manifest; with `verify` also its checksum. Raises as `open`."""
        for number in range(len(self.shards)):
            for name, (size, sha256) in self.shard(number).files.items():
                _check_file(self.directory / name, size, sha256 if verify else None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard, in order."""
        return tuple(self.shards["samples"].tolist())

    @property
    def manifest(self) -> JsonObject:
        """The manifest as JSON, every shard listed; made anew for each call."""
        return self._manifest.whole()

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the tokenizer that counted the tokens; None if nothing was counted."""
        return self._manifest.head.get("tokenizer_sha256")

    def shard(self, number: int) -> Shard:
        """The manifest's entry of shard `number`."""
        return self._manifest.shard(number)

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
        members = self._members(shard, row)
        digest = hashlib.sha256()
        for data in members.values():
            digest.update(data)
        if digest.hexdigest() != row.sha256:
            raise ShardError(f"{shard.path}: sample {row.key!r} is damaged (its bytes differ from the sidecar's hash)")
        names = shard.caption_keys
        return with_named_captions(self.kind, members, names) if names else members

    def _members(self, shard: OpenShard, row: Row) -> dict[str, bytes]:
        """The bytes of a sample, where its row says that they are."""
        tar = self._tar(shard)  # this reference keeps it open
        try:
            # pread does not use the file's position, so threads do not disturb one another.
            return {name: os.pread(tar.fileno(), size, offset) for name, (offset, size) in row.members.items()}
        except OSError as error:
            raise ShardError(f"{shard.path}: sample {row.key!r} cannot be read ({error.strerror})") from error

    def name(self, index: int) -> tuple[str, str]:
        """(tar, key) of sample `index`, for messages; where the sidecar cannot be read the key is "#" and its place."""
        number, place = self._locate(index)
        try:
            key = self._shard(number).rows[place].key
        except ShardError:
            key = f"#{place}"
        return self.shard(number).name, key

    def shard_of(self, index: int) -> int:
        """The number of the shard that sample `index` is in."""
        return self._locate(index)[0]

    def samples_of(self, number: int) -> range:
        """The numbers of the samples in shard `number`."""
        return range(self._starts[number], self._starts[number + 1])

    def open_file(self, name: str) -> FileIO:
        """A tar, a sidecar or the table of shards, opened for reading without a buffer.

        Raises:
            OSError, ShardUnavailable: it cannot be opened.
        """
        return (self.directory / name).open("rb", buffering=0)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens its own files, and need not look at all of them again.
        return functools.partial(Dataset.open, check=False), (self.directory,)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.directory}, which has {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            if number in self._open_shards:
                self._open_shards.move_to_end(number)
                return self._open_shards[number]
            entry = self.shard(number)
            path = self.directory / entry.name
            shard = self._open_shards[number] = OpenShard(path, self._rows(entry), entry.caption_keys)
            while len(self._open_shards) > _shards_kept():
                self._open_shards.popitem(last=False)  # closed once no thread reads from it
            return shard

    def _rows(self, shard: Shard) -> Sequence[Row]:
        index = self.directory / shard.index
        raw = self._content(shard.index, shard.index_bytes, shard.index_sha256)
        rows: Sequence[Row]
        try:
            if self._manifest.head["schema"] == SCHEMA_OF_LINES:
                rows = rows_of_lines(raw[:], shard.name, shard.bytes)
            else:
                rows = rows_in(raw, shard.name, shard.bytes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"not a sidecar of {self._manifest.head['schema']} ({why(error)})"
            raise ShardUnavailable(f"{index}: {what}; build the data set again") from error
        if len(rows) != shard.samples:
            raise ShardUnavailable(
                f"{index}: has {len(rows)} samples, the manifest says {shard.samples}; build the data set again"
            )
        return rows

    def _content(self, name: str, size: int, sha256: str) -> Mapped:
        """A sidecar or the table of shards, with the size and the checksum of the manifest."""
        path = self.directory / name
        try:
            with self.open_file(name) as file:
                raw = mapped(file)
        except OSError as error:
            _raise_if_the_process_is_short(error)
            raise ShardUnavailable(f"{path}: cannot be read ({error.strerror})") from error
        if (
            len(raw) != size or hashlib.sha256(raw).hexdigest() != sha256
        ):  # or samples would be others, and nobody would know
            found = "" if len(raw) == size else f" (it has {len(raw)} bytes in place of {size})"
            raise ShardUnavailable(
                f"{path}: checksum differs from the manifest's{found}: damaged; build the data set again"
            )
        return raw

    def _tar(self, shard: OpenShard) -> FileIO:
        with shard.lock:
            if shard.tar is None:
                try:
                    shard.tar = self.open_file(shard.path.name)
                except OSError as error:
                    _raise_if_the_process_is_short(error)
                    raise ShardUnavailable(f"{shard.path}: cannot be read ({error.strerror})") from error
            return shard.tar


_OPEN: weakref.WeakSet[Dataset] = weakref.WeakSet()
"""The data sets of this process, among which it shares the files that it may open."""

_MOST_KEPT = 1024


def _shards_kept() -> int:
    """How many shards of a data set stay open: with two files each, half of those that this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(4, min(_MOST_KEPT, limit // 4 // len(_OPEN))) if limit != resource.RLIM_INFINITY else _MOST_KEPT


class OpenShard:
    """The rows of a sidecar, and its tar once it is open."""

    def __init__(self, path: Path, rows: Sequence[Row], caption_keys: tuple[str, ...]) -> None:
        self.path, self.rows, self.caption_keys = path, rows, caption_keys
        self.tar: FileIO | None = None
        self.lock = threading.Lock()


def _raise_if_the_process_is_short(error: OSError) -> None:
    """Raises what is no fault of the data: a process that may open no more files would pass all of them over."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise error


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
