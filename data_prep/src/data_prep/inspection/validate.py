"""Validates data sets: manifest, checksums, hashes, keys, texts, and whether images can be decoded."""

from __future__ import annotations

import hashlib
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from data_prep.execute.engines import worker_pool
from data_prep.images import ImageRefused, check_stored
from data_prep.shards import Dataset, Row, ShardError, Unusable, content_of, texts_in
from data_prep.shards.format import IMAGE_TYPES, negatives_among
from data_prep.sources.tars import tar_members


@dataclass(frozen=True)
class Problem:
    """A fault: in which data set, where in it, what."""

    dataset: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.dataset}{f', {self.where}' if self.where else ''}: {self.what}"


def validate(
    directory: Path, *, workers: int = 1, decode: bool = True, tick: Callable[[int], None] = lambda samples: None
) -> Iterator[Problem]:
    """Check one data set, shard by shard; yields the faults.

    Args:
        decode: also decode every image.
        tick: called with the number of samples of each shard that was checked.
    """
    _opened.cache_clear()  # the folder may hold another data set by now
    try:
        dataset = _opened(directory)
        dataset.check()
    except ShardError as error:
        yield Problem(str(directory), "", str(error))
        return
    check = partial(_check_shard, directory, decode)
    results = _checked(check, len(dataset.shard_sizes), workers)
    for samples, problems in zip(dataset.shard_sizes, results, strict=True):
        tick(samples)
        yield from problems


def _checked(check: Callable[[int], list[Problem]], shards: int, workers: int) -> Iterator[list[Problem]]:
    if workers == 1 or shards == 1:
        yield from map(check, range(shards))
        return
    with worker_pool(workers) as submit:
        for future in [submit(check, number) for number in range(shards)]:
            yield future.result()


def _check_shard(directory: Path, decode: bool, number: int) -> list[Problem]:
    """The faults of one shard. Keys name samples within it: other people's tars may each count from 0."""
    dataset = _opened(directory)
    problems: list[Problem] = []
    keys: set[str] = set()
    shard = dataset.shard(number)
    tar = directory / shard.name
    for name, (_, sha256) in shard.files.items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                what = "checksum differs from the manifest's: damaged; build the data set again"
                return [Problem(str(directory), name, what)]
    places = _places(tar)
    for index in dataset.samples_of(number):
        try:
            row = dataset.row(index)
        except ShardError as error:
            return [Problem(str(directory), tar.name, str(error))]
        where = f"{tar.name}, sample {row.key!r}"
        if row.key in keys:
            problems.append(Problem(str(directory), where, "its key occurs twice in the shard"))
        keys.add(row.key)
        problems += [
            Problem(str(directory), where, what) for what in _check_sample(dataset, index, row, places, decode)
        ]
    return problems


@lru_cache(maxsize=1)
def _opened(directory: Path) -> Dataset:
    """A data set, opened once a process; `validate` itself looks whether all files are there."""
    return Dataset.open(directory, check=False)


def _check_sample(
    dataset: Dataset, index: int, row: Row, places: dict[str, tuple[int, int]], decode: bool
) -> Iterator[str]:
    for extension, place in row.members.items():
        if places.get(f"{row.key}.{extension}") != place:
            yield f"the tar has no member {row.key}.{extension} where the sidecar says"
    try:
        members = dataset.read(index)
    except ShardError as error:
        yield str(error)
        return
    images = [extension for extension in members if extension in IMAGE_TYPES]
    if dataset.kind.startswith("image") != (len(images) == 1):
        yield f"has {len(images)} images, which does not fit {dataset.kind}"
    else:
        yield from _check_texts(members, dataset.kind, row)
    if decode:
        for extension in (*images, *negatives_among(members)):
            try:
                check_stored(members[extension], max_pixels=sys.maxsize)
            except ImageRefused as error:
                yield f"its .{extension} cannot be decoded ({error.__cause__ or error})"


def _check_texts(members: dict[str, bytes], kind: str, row: Row) -> Iterator[str]:
    try:
        content = content_of(kind, members)
    except Unusable as error:
        yield str(error)
        return
    languages: set[str] = set()
    for part, texts in texts_in(kind, content):
        languages.update(text["language"] for text in texts)
        if "json" in members and not all(text.get(field) for text in texts for field in ("origin", "role")):
            yield f"a text of its {part} lacks origin or role, which the format has and training does without"
    if "json" in members and set(row.languages) != languages:
        yield f"its texts are in {sorted(languages)}, the sidecar says {sorted(row.languages)}"


def _places(tar: Path) -> dict[str, tuple[int, int]]:
    """Name → offset and size of each member, from the tar itself; extensions in lower case, as in sidecars.

    A tar that is cut short counts up to there: what stands behind is in no sidecar.
    """
    places: dict[str, tuple[int, int]] = {}
    with tar.open("rb") as file:
        for member in tar_members(tar, file):
            if isinstance(member, tarfile.TarInfo):
                head, dot, extension = member.name.rpartition(".")
                name = f"{head}{dot}{extension.lower()}"
                places.setdefault(name, (member.offset_data, member.size))  # of equal names the first is the sample's
    return places
