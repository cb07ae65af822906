"""Data sets under URLs, read through copies in a folder of this machine, which are fetched before they are needed.

A copy appears whole, with the manifest's size and checksum, or not at all; see `shard_cache` for who may fetch it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import IO, Any

from data_prep.shards import MANIFEST, Dataset, ShardError, ShardUnavailable, index_name

from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote import FULL, Address, Failure, check, fetch, is_remote
from stage_trainer.data.sampler import TaskSampler
from stage_trainer.data.shard_cache import Room, locked, part_name, try_lock
from stage_trainer.errors import UserError
from stage_trainer.recipe import Remote


def place(data: DataConfig, split: str, path: str) -> Path | RemotePlace:
    """Where a data set of a recipe lies: below the split of its corpus, unless its path says more.

    Raises:
        UserError: a command that the recipe does not allow.
    """
    if is_remote(path):
        address = Address(path)
    elif is_remote(data.corpus) and not os.path.isabs(path):
        address = Address(data.corpus, f"{split}/{path}")
    else:
        return Path(data.corpus) / split / path
    check(address.base, data.remote)
    return RemotePlace(address, data.remote)


class RemotePlace:
    """A place that is no folder: `open` gives its data set, `is_dir` says whether there is one, as for a `Path`."""

    def __init__(self, address: Address, settings: Remote):
        self.address, self.settings = address, settings

    def __str__(self) -> str:
        return str(self.address)

    def is_dir(self) -> bool:
        return self._manifest(missing_is_none=True) is not None

    def open(self) -> RemoteDataset:
        """The data set; nothing but its manifest has been fetched then.

        Raises:
            UserError: the manifest cannot be had.
            ShardError: it is no manifest.
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


def open_place(where: str | Path | RemotePlace) -> Dataset:
    """The data set at a folder or elsewhere.

    Raises:
        ShardError, FileNotFoundError: it is missing or damaged.
        UserError: its manifest cannot be had.
    """
    return where.open() if isinstance(where, RemotePlace) else Dataset.open(where)


def manifest_of(address: Address, settings: Remote) -> bytes:
    """The manifest as it is there now. Raises Failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        try:
            fetch(address, MANIFEST, path, settings)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); free some space") from error
        return path.read_bytes()


def look_ahead(data_sets: Sequence[Dataset], sampler: TaskSampler) -> None:
    """Lets the data sets that lie elsewhere fetch what a sampler comes to after the batch that it was asked for."""
    if any(isinstance(data, RemoteDataset) for data in data_sets):
        for data, shards in zip(data_sets, sampler.shards_ahead(), strict=True):
            if isinstance(data, RemoteDataset):
                data.expect(shards)


def check_room(settings: Remote, read: Sequence[tuple[Sequence[Dataset], TaskSampler | None]]) -> None:
    """UserError if a step's shards and those that come next have no room together.

    Args:
        read: the data sets of each task, with what draws from them.
    """
    needed = sum(
        data.bytes_of(shards)
        for data_sets, sampler in read
        if sampler is not None
        for data, shards in zip(data_sets, sampler.shards_ahead(), strict=True)
        if isinstance(data, RemoteDataset)
    )
    if settings.gigabytes is not None and needed > settings.gigabytes * 1e9:
        raise UserError(
            f"remote.gigabytes is {settings.gigabytes:g}, but a step and the windows of shards that come next need "
            f"{needed / 1e9:.3g}; set it higher, or leave it out for no limit"
        )


def fetch_sidecars(data_sets: Sequence[Dataset]) -> None:
    """Fetches the sidecars of all that lies elsewhere, for those who read all of them.

    Raises:
        ShardUnavailable, UserError: one cannot be had.
    """
    for data in data_sets:
        if isinstance(data, RemoteDataset):
            names = [index_name(shard["name"]) for shard in data.manifest["shards"]]
            with ThreadPoolExecutor(data.settings.downloads) as pool:
                for _ in pool.map(data.fetch, names):
                    pass


class RemoteDataset(Dataset):
    """A data set under a URL, whose sidecars and tars are fetched when they are first needed, or before.

    A file that cannot be had although its manifest can is a `ShardUnavailable`, for all processes, until a run begins
    anew.

    Args:
        address: where it lies.
        settings: the folder for copies, and how to fetch.
        raw: the bytes of its manifest.
        since: when the run opened it, in seconds since the epoch; what failed before may be tried again.
    """

    def __init__(self, address: Address, settings: Remote, raw: bytes, since: float):
        folder = address.folder
        name = f"{folder.name}@{hashlib.sha256(raw).hexdigest()[:16]}"
        cache = Path(settings.cache).expanduser()
        super().__init__(cache / folder.with_name(name), raw)
        self.address, self.settings, self.since = address, settings, since
        self._raw = raw
        self._room = Room(cache, settings.gigabytes)
        shards = self.manifest["shards"]
        self._files: dict[str, tuple[int, str]] = {s["name"]: (s["bytes"], s["sha256"]) for s in shards}
        self._files |= {index_name(s["name"]): (s["index_bytes"], s["index_sha256"]) for s in shards}
        self._expected: list[int] | None = None
        self._ahead: _Ahead | None = None
        self._held: dict[str, FileIO] = {}
        self._sound: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteDataset, (self.address, self.settings, self._raw, self.since)

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes of some shards with their sidecars."""
        entries = [self.manifest["shards"][number] for number in shards]
        return sum(entry["bytes"] + entry["index_bytes"] for entry in entries)

    def read(self, index: int) -> dict[str, bytes]:
        """As `Dataset.read`; a copy that was spoiled since it was fetched is fetched once more."""
        try:
            return super().read(index)
        except ShardUnavailable:
            raise
        except ShardError:
            if not self._spoiled(self.shard_of(index)):
                raise
            return super().read(index)

    def _spoiled(self, number: int) -> bool:
        """Whether the copy of a tar is no longer what the manifest says; it is gone then."""
        entry = self.manifest["shards"][number]
        with self.open_file(entry["name"]) as file:
            if number in self._sound or hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                self._sound.add(number)  # so the data set itself is at odds with its sidecar
                return False
        (self.directory / entry["name"]).unlink(missing_ok=True)
        with self._lock:
            self._open_shards.pop(number, None)
        self._held.pop(entry["name"], None)
        return True

    def open_file(self, name: str) -> FileIO:
        """A file of the data set, fetched if it is not here. As long as it is open its copy stays.

        Raises:
            ShardUnavailable: it cannot be had.
            UserError: neither can the manifest, or the disk is full.
        """
        file = self._open(name, ahead=False)
        assert file is not None
        return file

    def fetch(self, name: str) -> None:
        """Sees to it that a file is here. Raises as `open_file`."""
        self.open_file(name).close()

    def expect(self, shards: Sequence[int]) -> None:
        """Told which shards are read now and next, nearest first: these are fetched ahead of need, and those that
        this process has open beyond them are let go. Of all processes that share the folder one fetches ahead."""
        if self._expected == list(shards):
            return
        self._expected = list(shards)
        with self._lock:
            for number in [n for n in self._open_shards if n not in shards]:
                del self._open_shards[number]
        if self._ahead is None and (lead := try_lock(self._folder() / ".ahead")):
            self._ahead = _Ahead(self, lead, self.settings.downloads)
        if self._ahead is not None:
            tars = [self.manifest["shards"][number]["name"] for number in shards]
            names = [name for tar in tars for name in (index_name(tar), tar)]
            for name in [n for n in list(self._held) if n not in names]:
                del self._held[name]
            self._ahead.want([name for name in names if name not in self._held])

    def hold(self, name: str) -> None:
        """Fetches a file if there is room for it; a tar stays open, so that nobody clears it away before it is read."""
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
            if os.fstat(file.fileno()).st_size != size:  # somebody's hand, or a crash of the machine
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):  # another user's copy
                os.utime(file.fileno())  # what was not read for the longest goes first
            return file

    def _get(self, name: str, ahead: bool) -> bool:
        """Sees to it that a file is here, waiting for a process that fetches it; False if `ahead` and without room."""
        folder, (size, sha256) = self._folder(), self._files[name]
        path, part, broken = folder / name, folder / part_name(name, size), folder / f".{name}.broken"
        with locked(folder / f".{name}.lock"):
            if path.exists():
                return True
            if broken.exists() and broken.stat().st_mtime >= self.since:
                raise ShardUnavailable(broken.read_text(encoding="utf-8"))
            try:
                if not self._room.reserve(part, size) and ahead:
                    return False
                try:
                    fetch(self.address, name, part, self.settings, size, sha256)
                except OSError as error:
                    if error.errno not in FULL or not self._room.clear():
                        raise
                    fetch(self.address, name, part, self.settings, size, sha256)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.rename(path)
            except OSError as error:
                raise self._disk_refused(error) from error
            except Failure as failure:
                reason = self._given_up(name, failure)
                with contextlib.suppress(OSError):
                    broken.write_text(reason, encoding="utf-8")
                    os.utime(broken, (time.time(),) * 2)  # by the clock of `since`, not by the disk's coarser one
                raise ShardUnavailable(reason) from failure
            finally:
                part.unlink(missing_ok=True)
            broken.unlink(missing_ok=True)
            return True

    def _given_up(self, name: str, failure: Failure) -> str:
        """What to say of a file that cannot be had. Raises UserError if the fault is not the file's alone."""
        here = f"{self.address.shown(name)}: {failure}"
        try:
            now = manifest_of(self.address, self.settings)
        except Failure as also:
            raise UserError(
                f"{here}; {MANIFEST} beside it cannot be had either ({also}). "
                "Once it can, the same command goes on from the last checkpoint"
            ) from also
        if now != self._raw:
            raise UserError(
                f"{here}; {MANIFEST} beside it is another than when the run began: the data set was replaced. "
                "Put the former one back, or begin anew with this one"
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


class _Ahead:
    """Threads that fetch what will be read next; they end with their data set, or with the process."""

    def __init__(self, data: RemoteDataset, lead: IO[bytes], threads: int):
        self._lead = lead  # its lock says that this process fetches ahead
        self._wanted: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        for _ in range(threads):
            # They know the data set weakly, or it would never go.
            threading.Thread(target=self._run, args=(weakref.ref(data),), name="fetch ahead", daemon=True).start()
        weakref.finalize(data, self._end)

    def want(self, names: list[str]) -> None:
        """Files to be fetched in place of those still waiting, nearest first."""
        with self._changed:
            self._wanted = names
            self._changed.notify_all()

    def _run(self, data_set: Callable[[], RemoteDataset | None]) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._ended:
                    self._changed.wait()
                if self._ended or (data := data_set()) is None:
                    return
                name = self._wanted.pop(0)
            with contextlib.suppress(ShardError, UserError):  # whoever needs the file meets it, and says so
                data.hold(name)
            del data

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._lead.close()
            self._changed.notify_all()
