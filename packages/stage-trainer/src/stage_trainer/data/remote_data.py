"""Data sets under URLs, read through local copies that are fetched before they are needed.

A copy appears complete, with the manifest's size and checksum, or not at all; `shard_cache` says which process may
fetch it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from data_prep.shards import MANIFEST, Dataset, OpenShard, Row, Shard, ShardError, ShardUnavailable

from stage_trainer.data.config import DataConfig
from stage_trainer.data.download import check_command, fetch
from stage_trainer.data.http import FULL, Failure
from stage_trainer.data.prefetch import Prefetcher
from stage_trainer.data.ranges import NoRanges, fetch_span
from stage_trainer.data.shard_cache import CacheFolder, locked, part_name, ranks_here, try_lock
from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import Address, is_remote


def place(data: DataConfig, split: str, path: str) -> Path | RemotePlace:
    """Where a data set of a recipe is: below the split of its corpus, unless its path is absolute or a URL.

    Raises:
        UserError: a command that the recipe does not allow.
    """
    if is_remote(path):
        address = Address(path)
    elif is_remote(data.corpus) and not os.path.isabs(path):
        address = Address(data.corpus, f"{split}/{path}")
    else:
        return Path(data.corpus) / split / path
    check_command(address.base, data.remote)
    return RemotePlace(address, data.remote)


class RemotePlace:
    """A place that is not a folder: `open` returns its data set, `is_dir` says whether there is one (see `Path`)."""

    def __init__(self, address: Address, settings: RemoteConfig):
        self.address, self.settings = address, settings

    def __str__(self) -> str:
        return str(self.address)

    def is_dir(self) -> bool:
        return self._manifest(missing_is_none=True) is not None

    def open(self) -> RemoteDataset:
        """The data set, of which only the manifest has been fetched.

        Raises:
            UserError: the manifest cannot be fetched.
            ShardError: it is not a manifest.
        """
        raw = self._manifest()
        assert raw is not None
        return RemoteDataset(self.address, self.settings, raw, time.time())

    def _manifest(self, missing_is_none: bool = False) -> bytes | None:
        try:
            return manifest_of(self.address, self.settings)
        except Failure as failure:
            if failure.missing and missing_is_none:
                return None
            raise UserError(f"{self.address.shown(MANIFEST)}: {failure}; check the recipe's address of it") from failure


def open_place(where: str | Path | RemotePlace, *, check: bool = True) -> Dataset:
    """The data set at a folder or elsewhere; of a folder every file is looked at, unless `check` is false.

    Raises:
        ShardError, FileNotFoundError: it is missing or damaged.
        UserError: its manifest cannot be fetched.
    """
    return where.open() if isinstance(where, RemotePlace) else Dataset.open(where, check=check)


def manifest_of(address: Address, settings: RemoteConfig) -> bytes:
    """The manifest as it is now. Raises Failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        try:
            fetch(address, MANIFEST, path, settings)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); free some space") from error
        return path.read_bytes()


class RemoteDataset(Dataset):
    """A data set under a URL, whose sidecars and tars are fetched when they are first needed, or before.

    A file that cannot be fetched although its manifest can raises `ShardUnavailable`, in all processes of the run; the
    next run tries again.

    Args:
        address: where it is.
        settings: the folder for copies, and how to fetch.
        raw: the bytes of its manifest.
        since: when the run opened it, in seconds since the epoch; files that failed before are tried again.
    """

    def __init__(self, address: Address, settings: RemoteConfig, raw: bytes, since: float):
        folder = address.folder
        name = f"{folder.name}@{hashlib.sha256(raw).hexdigest()[:16]}"
        cache = Path(settings.cache).expanduser()
        self.address, self.settings, self.since = address, settings, since
        self._raw = raw
        self._counting, self._fetched, self._counted_by = threading.Lock(), 0, os.getpid()
        self._cache = CacheFolder(cache, settings.gigabytes)
        # Sizes and checksums of files, as they come into use: there may be a hundred thousand.
        self._files: dict[str, tuple[int, str]] = {}
        super().__init__(cache / folder.with_name(name), raw)
        self.by_ranges = settings.ranges == "always"
        self._expected: list[int] | None = None
        self._prefetcher: Prefetcher | None = None
        self._held: dict[str, FileIO] = {}
        self._verified: set[int] = set()

    def __reduce__(self) -> tuple[object, ...]:
        return RemoteDataset, (self.address, self.settings, self._raw, self.since)

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes that the cache needs for some shards with their sidecars."""
        entries = self.shards[list(shards)]
        return int((0 if self.by_ranges else entries["bytes"].sum()) + entries["index_bytes"].sum())

    def shard(self, number: int) -> Shard:
        """As `Dataset.shard`."""
        found = super().shard(number)
        self._files |= found.files
        return found

    def check(self, *, verify: bool = False) -> None:
        """Nothing: files are compared with the manifest when they are fetched."""

    def _content(self, name: str, size: int, sha256: str) -> mmap.mmap | bytes:
        self._files[name] = size, sha256  # of the table of shards, which names the others
        return super()._content(name, size, sha256)

    def _members(self, shard: OpenShard, row: Row) -> dict[str, bytes]:
        """As `Dataset._members`; of a tar that is not here, where it is read `by_ranges`, the sample's bytes alone."""
        name = shard.path.name
        if self.by_ranges and shard.tar is None and not shard.path.exists():
            start = min(offset for offset, _ in row.members.values())
            stop = max(offset + size for offset, size in row.members.values())
            try:
                content = fetch_span(self.address.of(name), start, stop - start, self.settings).content
            except NoRanges:
                self.by_ranges = False
                logging.getLogger(__name__).warning("%s sends no ranges; its shards are fetched whole", self.address)
                return super()._members(shard, row)
            except Failure as failure:
                raise ShardUnavailable(self._why_unavailable(name, failure)) from failure
            self._count(len(content))
            return {k: content[offset - start :][:size] for k, (offset, size) in row.members.items()}
        return super()._members(shard, row)

    def read(self, index: int) -> dict[str, bytes]:
        """As `Dataset.read`; a copy that was damaged after it was fetched is fetched once more."""
        try:
            return super().read(index)
        except ShardUnavailable:
            raise
        except ShardError:
            number = self.shard_of(index)
            name = self.shard(number).name
            if self.by_ranges and not (self.directory / name).exists():
                self.fetch(name)  # of a whole shard the manifest has the checksum
            elif not self._discard_damaged(number):
                raise
            return super().read(index)

    def _discard_damaged(self, number: int) -> bool:
        """Removes the copy of a tar if its checksum is no longer the manifest's; returns whether it did."""
        entry = self.shard(number)
        with self.open_file(entry.name) as file:
            if number in self._verified or hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256:
                self._verified.add(number)  # so the error is in the data set itself
                return False
        (self.directory / entry.name).unlink(missing_ok=True)
        with self._lock:
            self._open_shards.pop(number, None)
        self._held.pop(entry.name, None)
        return True

    def open_file(self, name: str) -> FileIO:
        """A file of the data set, fetched if there is no copy. The copy is kept at least until the file is closed.

        Raises:
            ShardUnavailable: it cannot be fetched.
            UserError: neither can the manifest, or the disk is full.
        """
        file = self._open(name, ahead=False)
        assert file is not None
        return file

    def fetch(self, name: str) -> None:
        """Fetches a file if there is no copy. Raises as `open_file`."""
        self.open_file(name).close()

    def take_fetched(self) -> int:
        """The bytes that this process has fetched since the last call."""
        return self._count(0, take=True)

    def _count(self, size: int, *, take: bool = False) -> int:
        """Adds bytes that were fetched; gives those so far, which begin anew where they are taken."""
        with self._counting:
            if self._counted_by != os.getpid():  # forked: what was fetched before is for the other process to tell
                self._fetched, self._counted_by = 0, os.getpid()
            found = self._fetched + size
            self._fetched = 0 if take else found
        return found

    def expect(self, shards: Sequence[int], rank: int = 0) -> None:
        """Takes the shards that a rank reads now and next, in that order: prefetches them, and closes all others. Of
        the rank's processes only one prefetches, and the machine's ranks share the number of downloads."""
        if self._expected == list(shards):
            return
        self._expected = list(shards)
        with self._lock:
            for number in [n for n in self._open_shards if n not in shards]:
                del self._open_shards[number]
        if self._prefetcher is None and (lock := try_lock(self._folder() / f".ahead-{rank}")):
            threads = -(-self.settings.downloads // len(ranks_here(rank)))
            self._prefetcher = Prefetcher(self, lock, threads)
        if self._prefetcher is not None:
            names = [name for number in shards for name in reversed(self.shard(number).files)]  # sidecars first
            if self.by_ranges:
                names = [name for name in names if not name.endswith(".tar")]
            for name in [n for n in list(self._held) if n not in names]:
                del self._held[name]
            self._prefetcher.want([name for name in names if name not in self._held])

    def hold(self, name: str) -> None:
        """Fetches a file if there is space for it; a tar stays open, so that it is not evicted before it is read."""
        file = self._open(name, ahead=True)
        if file is not None and name.endswith(".tar"):
            self._held[name] = file

    def _open(self, name: str, ahead: bool) -> FileIO | None:
        path, (size, _) = self.directory / name, self._files[name]
        while True:
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                if not self._get(name, ahead):
                    return None
                continue
            except OSError as error:
                raise self._disk_refused(error) from error
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_size != size:  # changed by hand, or by a crash of the machine
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):  # another user's copy
                os.utime(file.fileno())  # the least recently read is evicted first
            return file

    def _get(self, name: str, ahead: bool) -> bool:
        """Fetches a file, or waits for the process that does; False if `ahead` and there is no space."""
        folder, (size, sha256) = self._folder(), self._files[name]
        path, part, broken = folder / name, folder / part_name(name, size), folder / f".{name}.broken"
        with locked(folder / f".{name}.lock"):
            if path.exists():
                return True
            if broken.exists() and broken.stat().st_mtime >= self.since:
                raise ShardUnavailable(broken.read_text(encoding="utf-8"))
            try:
                if not self._cache.reserve(part, size) and ahead:
                    return False
                try:
                    fetch(self.address, name, part, self.settings, size, sha256)
                except OSError as error:
                    if error.errno not in FULL or not self._cache.clear():
                        raise
                    fetch(self.address, name, part, self.settings, size, sha256)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.rename(path)
            except OSError as error:
                raise self._disk_refused(error) from error
            except Failure as failure:
                reason = self._why_unavailable(name, failure)
                with contextlib.suppress(OSError):
                    broken.write_text(reason, encoding="utf-8")
                    os.utime(broken, (time.time(),) * 2)  # the clock of `since`, not the file system's coarser one
                raise ShardUnavailable(reason) from failure
            finally:
                part.unlink(missing_ok=True)
            broken.unlink(missing_ok=True)
            self._count(size)
            return True

    def _why_unavailable(self, name: str, failure: Failure) -> str:
        """The message for a file that cannot be fetched. Raises UserError if the whole data set cannot be."""
        here = f"{self.address.shown(name)}: {failure}"
        try:
            now = manifest_of(self.address, self.settings)
        except Failure as also:
            raise UserError(
                f"{here}; {MANIFEST} beside it cannot be fetched either ({also}). "
                "Once it can, the same command resumes from the last checkpoint"
            ) from also
        if now != self._raw:
            raise UserError(
                f"{here}; {MANIFEST} beside it is not the one with which the run began: the data set was replaced. "
                "Restore the former one, or start over with this one"
            )
        return f"{here}; put the file that {MANIFEST} lists there"

    def _folder(self) -> Path:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._disk_refused(error) from error
        return self.directory

    def _disk_refused(self, error: OSError) -> UserError:
        advice = "free some space, or set remote.gigabytes lower" if error.errno in FULL else "make it writable"
        return UserError(
            f"remote.cache, {self.settings.cache}, cannot be used ({error.strerror}): {advice}, or name another folder"
        )
