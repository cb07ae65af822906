"""Names, kinds and rules of the shard format, shared by the writer and the reader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

SCHEMA = "trilith-shards/2"
SCHEMA_OF_LINES = "trilith-shards/1"
"""The one before, whose sidecars are JSON lines: read, no longer written."""
MANIFEST = "manifest.json"
SHARDS = "shards.npy"
"""The table of a manifest's shards, where they are many."""

SHARD_SAMPLES, SHARD_BYTES = 10_000, 10**9
"""A shard is closed at so many samples, or at so many bytes: 10,000 images of 100 kB. Larger ones are not read faster,
and take longer to fetch before a first batch; of smaller ones a large set has too many files."""

JsonObject = dict[str, Any]
"""A parsed JSON object, or one to be written; values from outside are checked where they are used."""

# Each kind of data set, with the lists of texts that the .json of its samples must have. Those of `image-triplets` also
# have hard-negative images for their captions.
KINDS = {
    "text-pairs": ("query", "target"),
    "text-triplets": ("query", "target", "negatives"),
    "image-short": ("captions",),
    "image-long": ("captions",),
    "image-triplets": ("captions",),
}

# The extensions that a sample's image may have, with their media types. We never write "jpeg".
IMAGE_TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}

IMAGE_TRIPLETS = "image-triplets"
MOST_NEGATIVES = 64
"""Hard-negative images of a sample, at most."""
NEGATIVES = tuple(tuple(f"negative-{number}.{of}" for of in IMAGE_TYPES) for number in range(MOST_NEGATIVES))
"""The extensions that a sample's hard-negative images may have, by their number."""

# webdataset splits a member's name at its first dot; a plain tar header holds names of 100 bytes at most.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")


class ShardError(ValueError):
    """A data set that is missing, half written, damaged or of another schema; the message names the file."""


class ShardUnavailable(ShardError):
    """A shard of which no sample can be read: its tar or its sidecar is missing or damaged as a whole."""


def parse_json(raw: bytes | str) -> Any:
    """The value of JSON that may come from anywhere; nothing else in `data_prep` parses it.

    Its texts may hold half a character (a lone surrogate), its numbers be nan or of any size.

    Raises:
        ValueError: it is no JSON, its bytes are no text, a number has thousands of digits, or it nests too deeply.
    """
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def shard_name(number: int) -> str:
    """File name of the tar of shard `number`, counted from 0."""
    return f"{number:05d}.tar"


def index_name(tar_name: str, schema: str = SCHEMA) -> str:
    """File name of the sidecar that belongs to the tar `tar_name`."""
    return tar_name.removesuffix(".tar") + (".index.jsonl" if schema == SCHEMA_OF_LINES else ".index.npy")


def check_new_folder(path: Path) -> Path:
    """`path` itself, or ShardError if it ends in no name (".", "..", "/"): a folder is made under a similar name beside
    it, then renamed.
    """
    if path.name in ("", ".."):
        raise ShardError(f"{path}: expected the folder to be made by its own name, {path / 'NAME'} for example")
    return path


def check_source(source: str) -> str:
    """`source` itself, or ShardError if it could not stand in a manifest: readers would refuse the data set."""
    if not source.strip() or not source.isprintable():
        raise ShardError(f"source {source[:80]!a}: expected a name of printable characters")
    return source


def check_kind(kind: str) -> str:
    """`kind` itself, or ShardError if there is no such kind of data set."""
    if kind not in KINDS:
        raise ShardError(f"unknown kind of data set {kind!r}; there are {', '.join(KINDS)}")
    return kind


def is_key(key: str) -> bool:
    """Whether a sample may be written under this key."""
    return _KEY.fullmatch(key) is not None


def negatives_among(extensions: Iterable[str]) -> list[str]:
    """The extensions of hard-negative images, one of each number from 0 on, up to the first number without one."""
    found = set(extensions)
    of_each = ([extension for extension in of if extension in found] for of in NEGATIVES)
    return [extension for extension, *_ in takewhile(bool, of_each)]


def check_sample(kind: str, key: str, extensions: Iterable[str]) -> None:
    """ShardError if a sample of this kind cannot have such a key or such members."""
    found = sorted(extensions)
    longest = 83 if kind == IMAGE_TRIPLETS else 90  # with ".negative-63.jpeg" a name of 100 bytes
    if not is_key(key) or len(key) > longest:
        raise ShardError(
            f"sample key {key!r}: expected 1 to {longest} letters, digits, '-' or '_' (webdataset splits at dots)"
        )
    if kind.startswith("text"):
        if found != ["json"]:
            raise ShardError(f"sample {key!r} of {kind} has the members {found}; expected json alone")
        return
    images = [extension for extension in found if extension in IMAGE_TYPES]
    captions = [extension for extension in found if extension in ("json", "txt")]
    negatives = negatives_among(found) if kind == IMAGE_TRIPLETS else []
    known = len(images) + len(captions) + len(negatives)
    if len(images) != 1 or not captions or known != len(found) or (kind == IMAGE_TRIPLETS and not negatives):
        expected = f"one of {', '.join(IMAGE_TYPES)} and json or txt"
        if kind == IMAGE_TRIPLETS:
            expected += f" and negative-0.jpg, negative-1.jpg, …, at most {MOST_NEGATIVES}"
        raise ShardError(f"sample {key!r} of {kind} has the members {found}; expected {expected}")
