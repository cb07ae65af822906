"""A lane of shards without sidecars: an endless stream of samples, read by webdataset, shuffled in blocks."""

from __future__ import annotations

import errno
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from stage_trainer.data.drawn import Corrupt, Position
from stage_trainer.data.http import Failure
from stage_trainer.data.stateless_rng import key, permutation
from stage_trainer.errors import UserError

BLOCK_BYTES = 8 * 2**20
"""A block ends with the sample that brings it to so many bytes: of photographs of 1 MB it has 8."""

_BLOCK = 512  # of a tar, in bytes
_DAMAGE = (Failure, tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


@dataclass(frozen=True)
class StreamedShard:
    """A tar: its name for messages, and how it is opened, to be read once, from the start to the end."""

    name: str
    open: Callable[[], AbstractContextManager[IO[bytes]]]


class StreamedLane:
    """The samples of some shards, over and over.

    In every epoch the shards stand in a new order, and samples within blocks: as many in a row as `buffer` says, less
    at the end of an epoch or where they are large. So what sample n is depends on the seed, the shards and the
    position of its block, and reading goes on from there without what came before. The first block is shorter, by
    another part in each lane, so that not all lanes begin the next one at once.

    Args:
        shards: at least one.
        seed: determines the order; another in each lane.
        buffer: samples of a block.
        short: the share of `buffer` that the first block has, above 0.

    Attributes:
        position: of the open block.
        faults: what was damaged between the block before and the end of this one.
    """

    def __init__(self, shards: Sequence[StreamedShard], seed: int, buffer: int, short: float = 1.0):
        self.shards, self.seed, self.buffer, self.short = list(shards), seed, buffer, short
        self.faults: list[Corrupt] = []
        self._start = self.position = self._after = Position()
        self._block: list[dict[str, Any]] = []
        self._stream: Iterator[tuple[Position, dict[str, Any] | None]] | None = None

    def go_on(self, position: Position) -> None:
        """Where a reader that begins anew, in this process or one that is forked from it, may begin."""
        self._start = position

    def block(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """(the block that sample `number` of the lane is in, its place there). `position` is then the block's.

        A sample has its members by extension, `__key__` and `__url__`, the shard's name. Shards that cannot be read, or
        not to their end, are passed over, and entered in `faults`.

        Raises:
            UserError: no shard holds a sample.
        """
        if self._stream is None or number < self.position.first:
            self.close()
            self.position = self._after = self._start if self._start.first <= number else Position()
            self._block, self._stream = [], self._samples(self._after)
        while number >= self.position.first + len(self._block):
            self._read_block()
        return self._block, number - self.position.first

    def close(self) -> None:
        """Closes the shard that is open."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
            self._stream = None

    def following(self) -> Iterator[dict[str, Any]]:
        """The samples of the blocks after the one that was given last, by a reader of their own."""
        reader = StreamedLane(self.shards, self.seed, self.buffer, self.short)
        number = self.position.first + len(self._block)
        reader.go_on(self._after._replace(first=number))
        try:
            while True:
                block, _ = reader.block(number)
                yield from block
                number += len(block)
        finally:
            reader.close()

    def _read_block(self) -> None:
        assert self._stream is not None
        self.faults = []
        self.position = self._after._replace(first=self.position.first + len(self._block))
        size = self.buffer if self.position.first else max(1, round(self.buffer * self.short))
        found: list[dict[str, Any]] = []
        nothing, held = 0, 0
        while len(found) < size and held < BLOCK_BYTES:
            after, sample = next(self._stream)
            if sample is not None:
                found.append(sample)
                held += sum(len(content) for content in sample.values())
            elif found:
                self._after = after
                break
            elif (nothing := nothing + 1) > 1:  # the second end in a row: there was a whole epoch between them
                self._nothing_found()
            else:
                self.position = after._replace(first=self.position.first)
            self._after = after
        order = permutation(len(found), key(self.seed, "block", self.position.first))
        self._block = [found[place] for place in order]

    def _nothing_found(self) -> None:
        because = f", the last one because: {self.faults[-1].reason}" if self.faults else ": they are empty"
        raise UserError(
            f"{self.shards[0].name}: no sample could be read of the {len(self.shards)} shards that are read in turn "
            f"with this one{because}"
        )

    def _samples(self, at: Position) -> Iterator[tuple[Position, dict[str, Any] | None]]:
        """(the position after it, a sample) from a position on; at the end of each epoch (the next one's start, None).
        Positions have no `first`."""
        epoch, start, skipped = at.epoch, at.shard, at.member
        while True:
            order = permutation(len(self.shards), key(self.seed, "shards", epoch))
            for place in range(start, len(order)):
                for number, sample in enumerate(self._members(self.shards[order[place]])):
                    if number >= skipped:
                        yield Position(0, epoch, place, number + 1), sample
                skipped = 0
            epoch, start = epoch + 1, 0
            yield Position(0, epoch), None

    def _members(self, shard: StreamedShard) -> Iterator[dict[str, Any]]:
        """The samples of a shard, as webdataset groups them; up to where it is damaged."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def at_fault(error: Exception, key: str = "") -> bool:
            if isinstance(error, UserError) or not isinstance(error, _DAMAGE):
                raise error
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise error
                raise UserError(f"{shard.name}: cannot be read ({error.strerror})") from error
            if isinstance(error, Failure) and not error.missing:  # what follows must not depend on a server's health
                raise UserError(
                    f"{shard.name}: {error.args[0]}; once it can be fetched, the same command goes on from the last "
                    "checkpoint. If it cannot, leave it out of the path"
                ) from error
            # webdataset appends what it was at to the arguments.
            reason = error.args[1] if isinstance(error, OSError) and len(error.args) > 1 else error.args[0]
            self.faults.append(Corrupt(shard.name, key, f"{shard.name}: {reason}"))
            return True

        try:
            with shard.open() as opened:
                file = _Ended(opened)
                members = tar_file_expander([{"url": shard.name, "stream": file}])
                yield from group_by_keys(members, handler=partial(at_fault, key="?"))
                file.check()
        except _DAMAGE as error:
            at_fault(error)


class _Ended:
    """A tar on its way to `tarfile`, which takes a cut between two members, and a header that is none, for the end."""

    def __init__(self, file: IO[bytes]):
        self._file, self._first, self._last = file, b"", b""

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(size)
        self._first = self._first or found[:4]
        self._last = (self._last + found)[-_BLOCK:]
        return found

    def check(self) -> None:
        """ValueError if what was read is not the end of the tar: two empty blocks, and nothing after them."""
        if self._first.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX")):  # compressed: its own checksums are checked
            return
        if any(self._last):
            raise ValueError("it ends without the empty blocks that end a tar; it was cut, or is damaged")
        while rest := self._file.read(1 << 20):
            if any(rest):
                raise ValueError("a header in its middle is damaged; what comes after that was not read")
