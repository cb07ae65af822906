"""Writing a data set: the same samples always give the same bytes, and it appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import IO, Any

from .format import MANIFEST, SCHEMA, ShardError, check_kind, check_sample, index_name, shard_name


class DatasetWriter:
    """Writes one data set (tars, sidecars, manifest) into `directory`, which must not exist yet.

    Everything goes to the sibling `NAME.partial` first; leaving the `with` block without an exception flushes it to
    the disk and renames it. An exception, a full disk included, removes the partial directory and leaves nothing
    behind. What a killed run left there is removed by the next writer of the same data set; two writers of one data
    set at the same time are not supported.

    Args:
        directory: where the data set shall be; its parents are made.
        kind: one of `KINDS`.
        source: name of the source, as the recipe will call it ("emoji").
        samples_per_shard: a new tar is begun after so many samples.
        tokenizer_sha256: hash of the tokenizer file that counted the tokens, None if nothing was counted.

    Raises:
        ShardError: the directory exists, a sample does not fit its kind, a key comes twice, or the disk refuses.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        kind: str,
        source: str,
        samples_per_shard: int = 1000,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.kind = check_kind(kind)
        self.source = source
        if samples_per_shard < 1:
            raise ShardError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
        self._samples_per_shard = samples_per_shard
        self._tokenizer_sha256 = tokenizer_sha256
        self._partial = self.directory.with_name(self.directory.name + ".partial")
        self._keys: set[str] = set()
        self._shards: list[dict[str, Any]] = []
        self._tar: _TarFile | None = None
        self._rows: list[str] = []

    def __enter__(self) -> DatasetWriter:
        if self.directory.exists():
            raise ShardError(f"{self.directory}: exists already; remove it or write somewhere else")
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise _refused(self._partial, error) from error
        return self

    def write(self, key: str, members: dict[str, bytes], *, languages: list[str], tokens: int | None) -> None:
        """Append one sample.

        Args:
            key: unique in the data set; letters, digits, '-' and '_'.
            members: bytes by extension ("png", "json"), written in this order.
            languages: languages of its texts; `tokens`: the most tokens that any of its texts has, or None.
        """
        check_sample(self.kind, key, members)
        if key in self._keys:
            raise ShardError(f"sample key {key!r} comes twice in {self.directory}; keys name samples and must differ")
        self._keys.add(key)
        try:
            if self._tar is None:
                self._tar = _TarFile(self._partial / shard_name(len(self._shards)))
            places = {extension: self._tar.add(f"{key}.{extension}", data) for extension, data in members.items()}
        except OSError as error:
            raise _refused(self._partial / shard_name(len(self._shards)), error) from error
        digest = hashlib.sha256()
        for data in members.values():
            digest.update(data)
        row = {"key": key, "members": places, "languages": languages, "tokens": tokens, "sha256": digest.hexdigest()}
        self._rows.append(_json(row))
        if len(self._rows) == self._samples_per_shard:
            self._finish_shard()

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        try:
            if exception is None:
                self._publish()
        finally:
            if self._tar is not None:
                self._tar.abandon()
            shutil.rmtree(self._partial, ignore_errors=True)  # after the rename there is nothing there

    def _finish_shard(self) -> None:
        assert self._tar is not None
        name = self._tar.path.name
        index = "".join(row + "\n" for row in self._rows).encode()
        try:
            size, digest = self._tar.finish()
            _write_file(self._partial / index_name(name), index)
        except OSError as error:
            raise _refused(self._partial / name, error) from error
        self._shards.append(
            {
                "name": name,
                "samples": len(self._rows),
                "bytes": size,
                "sha256": digest,
                "index_bytes": len(index),
                "index_sha256": hashlib.sha256(index).hexdigest(),
            }
        )
        self._tar, self._rows = None, []

    def _publish(self) -> None:
        if self._rows:
            self._finish_shard()
        if not self._shards:
            raise ShardError(f"{self.directory}: no sample was written; an empty data set would only fail later")
        manifest = {
            "schema": SCHEMA,
            "kind": self.kind,
            "source": self.source,
            "samples": sum(shard["samples"] for shard in self._shards),
            "shards": self._shards,
            "tokenizer_sha256": self._tokenizer_sha256,
        }
        try:
            _write_file(self._partial / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
            _sync_directory(self._partial)
            self._partial.rename(self.directory)
            _sync_directory(self.directory.parent)
        except OSError as error:
            raise _refused(self.directory, error) from error


class _TarFile:
    """A ustar archive with nothing in it but names and bytes, hashed as it is written.

    `tarfile` is asked for the headers only: written by hand, the offset of every member's data is known at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("wb")
        self._offset = 0
        self._digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> list[int]:
        """Append a member; returns [offset, size] of its data."""
        info = tarfile.TarInfo(name)  # time 0, owner 0, no owner names: nothing of this machine or hour gets in
        info.size = len(data)
        info.mode = 0o444
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self._offset
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return [offset, len(data)]

    def finish(self) -> tuple[int, str]:
        """Close the archive, on the disk when this returns; gives its size and sha256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._offset, self._digest.hexdigest()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what is still buffered does not fit the disk either; it is removed anyway
            self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system can (Windows cannot open directories)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(path: Path, error: OSError) -> ShardError:
    reason = error.strerror or str(error)
    return ShardError(
        f"{path}: cannot be written ({reason}); make room or mend it and run again, nothing was published"
    )
