"""The manifest: what a data set holds, and which files it is made of.

manifest.json lists the shards itself, or names a table of them, which is mapped: parsed, a list of 80,000 shards takes
time and memory of each process. The table's sha256 is in manifest.json, whose hash therefore stands for all of a data
set.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.shards.fields import as_count, as_hash, as_name, as_text, shown
from data_prep.shards.format import (
    SCHEMA,
    SCHEMA_OF_LINES,
    SHARDS,
    JsonObject,
    ShardError,
    check_kind,
    index_name,
    parse_json,
)
from data_prep.shards.npy import Mapped, packed, table_in

if TYPE_CHECKING:
    import numpy as np

LISTED = 1000
"""So many shards manifest.json lists itself; it takes ten milliseconds to parse then."""

_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")  # names that a table may have
_FIELDS = {
    "name": as_name,
    "samples": as_count,
    "bytes": as_count,
    "sha256": as_hash,
    "index_bytes": as_count,
    "index_sha256": as_hash,
}


@dataclass(frozen=True)
class Shard:
    """A shard's entry.

    name: of the tar, which has `samples` in `bytes` with this `sha256`. index, index_bytes, index_sha256: name, size
    and hash of its sidecar. caption_keys: the fields of its .json that hold captions, if that is not of the format.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_bytes: int
    index_sha256: str
    caption_keys: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """{name of the tar and of the sidecar: (size, sha256)}."""
        return {self.name: (self.bytes, self.sha256), self.index: (self.index_bytes, self.index_sha256)}


class Manifest:
    """A parsed manifest, in which every field that is read later has its type.

    Args:
        path: of manifest.json, for messages; raw: its bytes.
        table: the content of a table, given its name, size and sha256.

    Attributes:
        head: its fields without those of the shards.
        shards: one record a shard, in order: `name`, `samples`, `bytes`, `sha256`, `index_bytes`, `index_sha256`, as
            README.md of data_prep has them.

    Raises:
        ShardError: it is none, or contradicts itself.
    """

    def __init__(self, path: Path, raw: bytes, table: Callable[[str, int, str], Mapped]) -> None:
        try:
            self.head: JsonObject = parse_json(raw)
            self._check_head(path)
            listed = self.head.pop("shards")
            self._captions: Sequence[tuple[str, ...]] = ()  # of each shard, or one for all, or none
            if isinstance(listed, dict):
                content = table(_table_name(listed), as_count(listed["bytes"]), as_hash(listed["sha256"]))
                self.shards = _table(content)
                captions = {tuple(map(as_name, listed.get("caption_keys", ())))}
            else:
                each = [tuple(map(as_name, shard.get("caption_keys", ()))) for shard in listed]
                captions = set(each)
                self.shards = _records([{field: check(s[field]) for field, check in _FIELDS.items()} for s in listed])
            if captions != {()}:
                self._captions = list(captions) if len(captions) == 1 else each
            self._check_shards(path)
        except ShardError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: not a manifest of {SCHEMA} ({why(error)}); build the data set again") from error

    def shard(self, number: int) -> Shard:
        """The entry of shard `number`."""
        found = self.shards[number]
        name, captions = found["name"].decode(), self._captions
        return Shard(
            name=name,
            samples=int(found["samples"]),
            bytes=int(found["bytes"]),
            sha256=found["sha256"].tobytes().hex(),
            index=index_name(name, self.head["schema"]),
            index_bytes=int(found["index_bytes"]),
            index_sha256=found["index_sha256"].tobytes().hex(),
            caption_keys=captions[number if len(captions) > 1 else 0] if captions else (),
        )

    def whole(self) -> JsonObject:
        """As JSON, with every shard listed."""
        shards = [asdict(self.shard(number)) for number in range(len(self.shards))]
        for shard in shards:
            del shard["index"]
            shard["caption_keys"] = list(shard["caption_keys"])
            if not shard["caption_keys"]:
                del shard["caption_keys"]
        return {**self.head, "shards": shards}

    def _check_head(self, path: Path) -> None:
        if (found := self.head["schema"]) not in (SCHEMA, SCHEMA_OF_LINES):
            raise ShardError(
                f"{path}: schema {shown(found)}, expected {SCHEMA!r} or {SCHEMA_OF_LINES!r}; build the data set again"
            )
        check_kind(as_name(self.head["kind"]))
        as_name(self.head["source"])
        as_count(self.head["samples"])

    def _check_shards(self, path: Path) -> None:
        names = [name.decode() for name in self.shards["name"].tolist()]
        for name in names:
            if "/" in name or name in (".", ".."):
                raise ShardError(f"{path}: names the shard {name!r}, which would lie outside of the data set")
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise ShardError(f"{path}: lists the shard {twice!r} twice; build the data set again")
        if self.head["samples"] != sum(self.shards["samples"].tolist()):
            raise ShardError(
                f"{path}: its shards do not add up to {self.head['samples']} samples; build the data set again"
            )


def why(error: Exception) -> str:
    """What is wrong with a foreign file, for a message."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def shards_field(shards: Sequence[JsonObject]) -> tuple[Any, bytes | None]:
    """The field `shards` of a manifest of these entries (see `Manifest.whole`), and the table if that names one."""
    captions = {tuple(shard.get("caption_keys", ())) for shard in shards}
    plain = all(_PLAIN.fullmatch(shard["name"]) for shard in shards)
    if len(shards) <= LISTED or len(captions) > 1 or not plain:
        return list(shards), None
    raw = packed(_records(shards))
    field = {"table": SHARDS, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (keys,) = captions
    return {**field, "caption_keys": list(keys)} if keys else field, raw


def _table_name(field: JsonObject) -> str:
    if (name := as_text(field["table"])) != SHARDS:
        raise ValueError(f"its table of shards is {shown(name)}, expected {SHARDS!r}")
    return name


def _records(shards: Sequence[JsonObject]) -> np.ndarray:
    import numpy as np

    names = [shard["name"].encode() for shard in shards]
    table = np.empty(len(names), _form(max([1, *map(len, names)])))
    table["name"] = names
    for field in ("samples", "bytes", "index_bytes"):
        table[field] = [shard[field] for shard in shards]
    for field in ("sha256", "index_sha256"):
        table[field] = [bytes.fromhex(shard[field]) for shard in shards]
    return table


def _table(raw: Mapped) -> np.ndarray:
    """The records of a table. ValueError if it is none."""
    table = table_in(raw)
    if "name" not in (table.dtype.names or ()) or table.dtype != _form(table.dtype["name"].itemsize):
        raise ValueError(f"{SHARDS} has the columns {shown(str(table.dtype))}")
    for name in table["name"].tolist():
        if not _PLAIN.fullmatch(name.decode("latin-1")):
            raise ValueError(f"{SHARDS}: {shown(name)}, expected a name of letters, digits, '.', '_' and '-'")
    for field in ("samples", "bytes", "index_bytes"):
        if ((table[field] < 0) | (table[field] >= 1 << 53)).any():
            raise ValueError(f"{SHARDS}: {field} of a shard below 0 or over 2^53")
    return table


def _form(name: int) -> np.dtype[np.void]:
    """The columns of a table, whose longest name has so many bytes."""
    import numpy as np

    numbers = ("samples", "<i8"), ("bytes", "<i8"), ("index_bytes", "<i8")
    return np.dtype([("name", f"S{name}"), *numbers, ("sha256", "V32"), ("index_sha256", "V32")])
