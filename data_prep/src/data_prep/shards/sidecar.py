"""Sidecars: where the samples of a tar are, and what is known of them without reading them.

A sidecar is a table that is mapped; those of `trilith-shards/1` are JSON lines that are parsed. README.md of data_prep
states both, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, overload

from data_prep.shards.content import encodes
from data_prep.shards.fields import as_count, as_hash, as_text, shown
from data_prep.shards.format import IMAGE_TYPES, NEGATIVES, ShardError, parse_json
from data_prep.shards.npy import Mapped, packed, table_in

if TYPE_CHECKING:
    import numpy as np

MEMBERS = (*IMAGE_TYPES, "json", "txt", *chain.from_iterable(NEGATIVES))
"""The extensions that members may have, in the order in which a sample's hash takes them."""

LONGEST_KEY = 1000
"""Bytes: the keys of a table are as wide as its longest one."""

_PLACES = {name: place for place, name in enumerate(MEMBERS)}

_ABSENT = (1 << 64) - 1  # offset and size of a member that a sample lacks
_NOT_COUNTED = -1  # tokens


@dataclass(frozen=True)
class Row:
    """One row of a sidecar: where a sample is and what is known without reading it."""

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


def row_of(
    key: str,
    places: Mapping[str, Sequence[int]],
    data: Mapping[str, bytes],
    *,
    languages: Sequence[str],
    tokens: int | None,
    shard: str,
) -> Row:
    """The row of a sample, to be written.

    Args:
        places: offset and size of each member by extension; data: its bytes.
        languages, tokens: as of `DatasetWriter.write`. shard: name of the tar.

    Raises:
        ShardError: a table cannot hold it.
    """
    if fault := key_fault(key):
        raise ShardError(f"sample key {shown(key)}: {fault}")
    if not all(name and not set(name) & set("/\0") and encodes(name) for name in languages):
        raise ShardError(f"sample {key!r}: languages {shown(list(languages))}, expected names without / and NUL")
    if tokens is not None and not 0 <= tokens < 1 << 31:
        raise ShardError(f"sample {key!r}: {tokens} tokens, expected a number from 0 to 2^31")
    if foreign := data.keys() - _PLACES.keys():
        raise ShardError(
            f"sample {key!r} has the members {sorted(foreign)}; expected "
            f"{', '.join(IMAGE_TYPES)}, json, txt or negative-0.jpg, negative-1.jpg, …"
        )
    digest, members = hashlib.sha256(), {}
    for name in sorted(data, key=_PLACES.__getitem__):
        digest.update(data[name])
        offset, size = places[name]
        members[name] = offset, size
    return Row(key, members, tuple(languages), tokens, digest.hexdigest(), shard)


def key_fault(key: str) -> str:
    """Why a table cannot hold a key, in a few words; "" if it can."""
    if not encodes(key):
        return "name that is not UTF-8"
    if "\0" in key:
        return "name that holds NUL"
    return f"name of more than {LONGEST_KEY:,} bytes" if len(key.encode()) > LONGEST_KEY else ""


def table_of(rows: Sequence[Row]) -> bytes:
    """The sidecar of a tar whose samples are `rows`, in its order; one or more."""
    import numpy as np

    keys = [row.key.encode() for row in rows]
    languages = ["/".join(row.languages).encode() for row in rows]
    members = sorted({name for row in rows for name in row.members}, key=_PLACES.__getitem__)
    table = np.empty(len(rows), _form(max(1, *map(len, keys)), max(1, *map(len, languages)), members))
    table["key"], table["languages"] = keys, languages
    table["tokens"] = [_NOT_COUNTED if row.tokens is None else row.tokens for row in rows]
    table["sha256"] = [bytes.fromhex(row.sha256) for row in rows]
    for name in members:
        table[name] = [row.members.get(name, (_ABSENT, _ABSENT)) for row in rows]
    return packed(table)


def rows_in(raw: Mapped, tar: str, size: int) -> Table:
    """The rows of a sidecar, of the tar called `tar` of `size` bytes. ValueError if it is none."""
    return Table(table_in(raw), tar, size)


def rows_of_lines(raw: bytes, tar: str, size: int) -> list[Row]:
    """The rows of a sidecar of `trilith-shards/1`. AttributeError, KeyError, TypeError, ValueError if it is none."""
    # Of bytes: a text's `splitlines` also splits at U+0085 and U+2028, inside names.
    return [_row_of_line(line, tar, size) for line in raw.splitlines()]


class Table(Sequence[Row]):
    """The rows of a mapped sidecar, each made when it is asked for.

    Attributes:
        columns: the table itself, fields as in README.md.
    """

    def __init__(self, columns: np.ndarray, tar: str, size: int) -> None:
        self.columns, self._tar = columns, tar
        names = columns.dtype.names or ()
        self._members = [name for name in MEMBERS if name in names]
        key, languages = (columns.dtype[name].itemsize if name in names else 0 for name in ("key", "languages"))
        if columns.dtype != _form(key, languages, self._members):
            raise ValueError(f"its columns are {shown(str(columns.dtype))}")
        # Each must be UTF-8 by itself: half a character before a line end is none.
        b"\n".join(columns["key"].tolist()).decode()
        self._languages = {
            found: tuple(found.decode().split("/")) if found else () for found in set(columns["languages"].tolist())
        }
        if (columns["tokens"] < _NOT_COUNTED).any():
            raise ValueError("a number of tokens below 0")
        for name in self._members:
            begins, sizes = columns[name].T
            outside = (begins > size) | (sizes > size - begins)
            if (outside & ((begins != _ABSENT) | (sizes != _ABSENT))).any():
                raise ValueError(f"a member {name} ends outside of a tar of {size:,} bytes")

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = self.columns[place]
        members = {name: (int(begin), int(size)) for name in self._members for begin, size in [row[name]]}
        tokens = int(row["tokens"])
        return Row(
            key=row["key"].decode(),
            members={name: found for name, found in members.items() if found != (_ABSENT, _ABSENT)},
            languages=self._languages[bytes(row["languages"])],
            tokens=None if tokens == _NOT_COUNTED else tokens,
            sha256=row["sha256"].tobytes().hex(),
            shard=self._tar,
        )


def _form(key: int, languages: int, members: Sequence[str]) -> np.dtype[np.void]:
    """The columns of a table: widths of its keys and languages in bytes, and the members that its samples have."""
    import numpy as np

    texts = [("key", f"S{key}"), ("languages", f"S{languages}"), ("tokens", "<i4"), ("sha256", "V32")]
    return np.dtype([*texts, *((name, "<u8", (2,)) for name in members)])


def _row_of_line(line: bytes, tar: str, size: int) -> Row:
    """A line of the sidecar of a tar of `size` bytes. KeyError, TypeError, ValueError if it is none."""
    entry = parse_json(line)
    members = {name: (as_count(start), as_count(length)) for name, (start, length) in entry["members"].items()}
    for name, (start, length) in members.items():
        if start + length > size:
            raise ValueError(f"member {name} ends at byte {start + length:,} of a tar of {size:,}")
    if not isinstance(entry["languages"], list):
        raise TypeError(f"languages are {shown(entry['languages'])}, expected a list")
    return Row(
        key=as_text(entry["key"]),
        members=members,
        languages=tuple(map(as_text, entry["languages"])),
        tokens=None if entry["tokens"] is None else as_count(entry["tokens"]),
        sha256=as_hash(entry["sha256"]),
        shard=tar,
    )
