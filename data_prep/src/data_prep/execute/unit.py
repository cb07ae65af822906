"""The unit of work: from one piece of the input to shards and a receipt, reproducibly."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.execute.dropped import DroppedList
from data_prep.shards import Row, ShardError, ShardWriter
from data_prep.shards.files import read_object, temporary, write_file, writing
from data_prep.shards.format import SHARD_SAMPLES, JsonObject, index_name
from data_prep.shards.sidecar import table_of
from data_prep.shards.writer import manifest_entry

_EXAMPLES = 5  # of what was dropped, per reason and unit

Work = Callable[[JsonObject, JsonObject, "Output"], None]


@dataclass(frozen=True)
class Spec:
    """The inputs of a unit: plain values, so that it can run on any machine that sees the same folders.

    work: "package.module:function", called as function(piece, options, output).
    directory: for the unit's shards (one folder a kind) and its receipt; number: of the unit, from 0.
    piece: this unit's part of the input; options: shared by all units of the job.
    """

    work: str
    directory: str
    number: int
    piece: JsonObject
    options: JsonObject = field(default_factory=dict)
    samples_per_shard: int = SHARD_SAMPLES

    @property
    def receipt_path(self) -> Path:
        return Path(self.directory) / "receipts" / f"{self.number:05d}.json"

    @property
    def dropped_path(self) -> Path:
        """The list of what the unit left out; no file if it left out nothing."""
        return Path(self.directory) / "dropped" / f"{self.number:05d}.jsonl"

    @property
    def source(self) -> str:
        """What the unit reads, for messages."""
        return str(self.piece.get("file") or self.piece.get("dataset") or f"unit {self.number}")


@dataclass(frozen=True)
class Receipt:
    """The result of a unit.

    came_in: records found in the piece. went_out: samples by kind. dropped: records left out, by reason; examples:
    where the first of them were found. notes: further counts, by name. shards: entries for the manifest, by kind.
    listed: bytes of the list of what was dropped.
    """

    number: int
    came_in: int = 0
    went_out: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    shards: dict[str, list[JsonObject]] = field(default_factory=dict)
    listed: int = 0


class Output:
    """Takes the samples of one unit, and counts what it dropped."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._open: dict[str, ShardWriter] = {}
        self._shards: dict[str, list[JsonObject]] = {}
        self._went_out: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._list = DroppedList(spec.dropped_path, spec.source)
        self._came_in = 0

    def came_in(self, count: int = 1) -> None:
        """Count records found in the input."""
        self._came_in += count

    def drop(self, reason: str, where: str, count: int = 1, *, content: Any = None, source: str = "") -> None:
        """Count records that are left out, for one of a few fixed reasons; `where` names the first.

        Each is listed, with the beginning of the texts in `content`, and as of `source` if that is not what the unit
        reads. Bytes of a file name that are not UTF-8 are escaped.
        """
        self._dropped[reason] += count
        where = where.encode("utf-8", "backslashreplace").decode()
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(where)
        self._list.add(reason, where, count, content, source)

    def mention(self, reason: str, where: str, *, content: Any = None) -> None:
        """List something that is left out of a sample, which itself is not dropped (one of its texts)."""
        self._list.add(reason, where, content=content)

    def note(self, name: str, count: int = 1) -> None:
        """Count something else for the receipt ("images encoded anew")."""
        self._notes[name] += count

    def next_key(self, kind: str) -> str:
        """The default key of the next sample of a kind: the unit's number and the sample's place."""
        return f"{self._spec.number:05d}-{self._went_out[kind]:06d}"

    def write(
        self,
        kind: str,
        members: dict[str, bytes],
        *,
        languages: Sequence[str],
        tokens: int | None = None,
        key: str | None = None,
    ) -> str:
        """Append a sample to the shards of its kind; returns its key.

        The default key is `next_key`, which is unique in the data set; a given one has to be.
        """
        key = key or self.next_key(kind)
        if kind not in self._open:
            self._open[kind] = ShardWriter(self._place(kind), kind)
        shard = self._open[kind]
        shard.write(key, members, languages=languages, tokens=tokens)
        self._went_out[kind] += 1
        if shard.is_full(self._spec.samples_per_shard):
            self._finish(kind)
        return key

    def adopt(self, kind: str, tar: Path, rows: Sequence[Row], caption_keys: Sequence[str] = ()) -> None:
        """Use an existing tar as a shard: a link to it, and a sidecar of `rows` beside the link.

        caption_keys: the fields of its .json that hold the captions, where these are not as the format has them.
        """
        index = table_of(rows)
        with tar.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        link = self._place(kind)
        with writing(link):
            fresh = temporary(link)
            fresh.symlink_to(tar.resolve())
            fresh.rename(link)
            write_file(link.with_name(index_name(link.name)), index)
        self._went_out[kind] += len(rows)
        entry = manifest_entry(link.name, len(rows), tar.stat().st_size, digest, index)
        self._shards[kind].append({**entry, "caption_keys": list(caption_keys)} if caption_keys else entry)

    def receipt(self) -> Receipt:
        """Finish the open shards and the list; returns the receipt."""
        for kind in list(self._open):
            self._finish(kind)
        return Receipt(
            self._spec.number,
            self._came_in,
            went_out=dict(sorted(self._went_out.items())),
            dropped=dict(sorted(self._dropped.items())),
            examples=dict(sorted(self._examples.items())),
            notes=dict(sorted(self._notes.items())),
            shards=dict(sorted(self._shards.items())),
            listed=self._list.finish(),
        )

    def abandon(self) -> None:
        """Remove the unfinished shards, and the unfinished list."""
        for shard in self._open.values():
            shard.abandon()
        self._list.abandon()

    def _place(self, kind: str) -> Path:
        """The path of the next shard of a kind; creates its folder."""
        folder = Path(self._spec.directory) / kind
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self._spec.number:05d}-{len(self._shards.setdefault(kind, [])):04d}.tar"

    def _finish(self, kind: str) -> None:
        self._shards[kind].append(self._open[kind].finish())
        del self._open[kind]


def process_shard(spec: Spec) -> Receipt:
    """Do one unit of work, unless its receipt exists; the receipt is written last.

    Raises:
        UserError, ShardError: what the user can fix (a full disk, a missing input); nothing unfinished stays.
    """
    done = read_receipt(spec)
    if done is not None:
        return done
    module, _, function = spec.work.partition(":")
    work: Work = getattr(importlib.import_module(module), function)
    output = Output(spec)
    try:
        work(spec.piece, spec.options, output)
        receipt = output.receipt()
    except BaseException as error:
        output.abandon()
        if isinstance(error, OSError) and error.filename is None:  # what is written names its file; this was a read
            raise UserError(f"{spec.source}: cannot be read ({error.strerror or error}); run again") from error
        raise
    with writing(spec.receipt_path):
        spec.receipt_path.parent.mkdir(parents=True, exist_ok=True)
        write_file(spec.receipt_path, (json.dumps(asdict(receipt), ensure_ascii=False) + "\n").encode())
    return receipt


def read_receipt(spec: Spec) -> Receipt | None:
    """The receipt of a unit whose shards are all there; None if the unit has to be done (again)."""
    try:
        receipt = Receipt(**read_object(spec.receipt_path))
        for kind, shards in receipt.shards.items():
            for shard in shards:
                tar = Path(spec.directory) / kind / shard["name"]
                for path, size in ((tar, shard["bytes"]), (tar.with_name(index_name(tar.name)), shard["index_bytes"])):
                    if not path.exists() or path.stat().st_size != size:
                        return None
        if receipt.listed and (not spec.dropped_path.exists() or spec.dropped_path.stat().st_size != receipt.listed):
            return None
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{spec.receipt_path}: not a receipt ({error}); remove the file and run again") from error
    return receipt
