"""Writing a data set: the same samples give the same bytes, and it appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_prep.shards.files import TarFile, refused, sync, write_file, writing
from data_prep.shards.format import (
    MANIFEST,
    SCHEMA,
    SHARD_BYTES,
    SHARD_SAMPLES,
    SHARDS,
    JsonObject,
    ShardError,
    check_kind,
    check_new_folder,
    check_sample,
    check_source,
    index_name,
    shard_name,
)
from data_prep.shards.lock import alone
from data_prep.shards.manifest import shards_field
from data_prep.shards.sidecar import Row, row_of, table_of


class ShardWriter:
    """Writes one shard, a tar at `path` and its sidecar beside it; both appear at `finish`.

    Raises:
        ShardError: a sample does not fit its kind, a key comes twice in the shard, or the disk refuses.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = Path(path)
        self._kind = kind
        self._rows: dict[str, Row] = {}
        with writing(self.path):
            self._tar = TarFile(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def is_full(self, samples: int = SHARD_SAMPLES) -> bool:
        """Whether it has so many samples, or `SHARD_BYTES`: then it is to be finished."""
        return len(self) >= samples or self._tar.size >= SHARD_BYTES

    def write(self, key: str, members: dict[str, bytes], *, languages: Sequence[str], tokens: int | None) -> None:
        """Append one sample; the arguments are those of `DatasetWriter.write`."""
        check_sample(self._kind, key, members)
        if key in self._rows:
            raise ShardError(f"sample key {key!r} comes twice in {self.path}; keys name samples and must differ")
        with writing(self.path):
            places = {extension: self._tar.add(f"{key}.{extension}", data) for extension, data in members.items()}
        self._rows[key] = row_of(key, places, members, languages=languages, tokens=tokens, shard=self.path.name)

    def finish(self) -> JsonObject:
        """Flush and rename both files; returns the shard's entry in the manifest."""
        index = table_of(list(self._rows.values()))
        with writing(self.path):
            size, digest = self._tar.finish()
            write_file(self.path.with_name(index_name(self.path.name)), index)
        return manifest_entry(self.path.name, len(self._rows), size, digest, index)

    def abandon(self) -> None:
        """Remove the unfinished files; no effect after `finish`."""
        self._tar.abandon()


def manifest_entry(name: str, samples: int, size: int, sha256: str, index: bytes) -> JsonObject:
    """A shard's entry in the manifest: size and hash of its tar, and those of its sidecar `index`."""
    return {
        "name": name,
        "samples": samples,
        "bytes": size,
        "sha256": sha256,
        "index_bytes": len(index),
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }


def write_manifest(
    directory: Path, *, kind: str, source: str, shards: Sequence[JsonObject], tokenizer_sha256: str | None = None
) -> None:
    """Write the manifest of the shards in `directory`: the entries that `ShardWriter.finish` returned, in order."""
    listed, table = shards_field(shards)
    manifest = {
        "schema": SCHEMA,
        "kind": check_kind(kind),
        "source": check_source(source),
        "samples": sum(shard["samples"] for shard in shards),
        "shards": listed,
        "tokenizer_sha256": tokenizer_sha256,
    }
    if table is not None:
        with writing(directory / SHARDS):
            write_file(directory / SHARDS, table)
    with writing(directory / MANIFEST):
        write_file(directory / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
        sync(directory)


class DatasetWriter:
    """Writes one data set (tars, sidecars, manifest) into `directory`, which must not exist yet.

    Everything goes to the sibling `NAME.partial` first; leaving the `with` block without an exception flushes it to
    the disk and renames it. An exception, a full disk included, removes the partial directory and leaves nothing
    behind. What a killed run left there is removed by the next writer of the same data set; a second writer of a data
    set that is being written is refused.

    Args:
        directory: where the data set shall be; its parents are made.
        kind: one of `KINDS`.
        source: name of the source, as the recipe will call it ("emoji").
        samples_per_shard: a new tar is begun after so many samples, or after `SHARD_BYTES`.
        tokenizer_sha256: hash of the tokenizer file that counted the tokens, None if nothing was counted.

    Raises:
        ShardError: the directory exists or ends in no name, `source` is none, a sample does not fit its kind, a key
            comes twice, or the disk refuses.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        kind: str,
        source: str,
        samples_per_shard: int = SHARD_SAMPLES,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self.directory = check_new_folder(Path(directory))
        self.kind = check_kind(kind)
        self.source = check_source(source)
        if samples_per_shard < 1:
            raise ShardError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
        self._samples_per_shard = samples_per_shard
        self._tokenizer_sha256 = tokenizer_sha256
        self._partial = self.directory.with_name(self.directory.name + ".partial")
        self._held = contextlib.ExitStack()
        self._keys: set[str] = set()
        self._finished: list[JsonObject] = []
        self._shard: ShardWriter | None = None

    def __enter__(self) -> DatasetWriter:
        if self.directory.exists():
            raise ShardError(f"{self.directory}: exists already; remove it or write somewhere else")
        try:
            lock = self.directory.with_name(f".{self.directory.name}.lock")
            self._held.enter_context(alone(lock, f"{self.directory} is being written: it"))
            if self.directory.exists():  # a writer has just finished it
                self._held.close()
                raise ShardError(f"{self.directory}: exists already; remove it or write somewhere else")
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        except OSError as error:
            self._held.close()
            raise refused(self._partial, error) from error
        return self

    @property
    def unpublished(self) -> Path:
        """The folder until the end of the block; further files that are put there are published with it."""
        return self._partial

    def write(self, key: str, members: dict[str, bytes], *, languages: Sequence[str], tokens: int | None) -> None:
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
        if self._shard is None:
            self._shard = ShardWriter(self._partial / shard_name(len(self._finished)), self.kind)
        self._shard.write(key, members, languages=languages, tokens=tokens)
        if self._shard.is_full(self._samples_per_shard):
            self._finish_shard(self._shard)

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        try:
            if exception is None:
                self._publish()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            shutil.rmtree(self._partial, ignore_errors=True)  # gone already if it was renamed
            self._held.close()

    def _finish_shard(self, shard: ShardWriter) -> None:
        self._finished.append(shard.finish())
        self._shard = None

    def _publish(self) -> None:
        if self._shard is not None:
            self._finish_shard(self._shard)
        if not self._finished:
            raise ShardError(f"{self.directory}: no sample was written; an empty data set would only fail later")
        write_manifest(
            self._partial,
            kind=self.kind,
            source=self.source,
            shards=self._finished,
            tokenizer_sha256=self._tokenizer_sha256,
        )
        with writing(self.directory):
            self._partial.rename(self.directory)
            sync(self.directory.parent)
