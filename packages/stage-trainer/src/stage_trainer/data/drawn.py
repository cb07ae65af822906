"""What went into a batch, for the monitor and the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from text_tower import PackedTokens

LEDGER = "corrupt.jsonl"
"""Of the samples that were replaced, in a stage's folder."""


@dataclass(frozen=True)
class Corrupt:
    """A sample that was replaced: an entry of the ledger."""

    shard: str
    key: str
    reason: str


class Position(NamedTuple):
    """Where a block of a `StreamedLane` begins: `first` is the number of its first sample in the lane; that is sample
    number `member` of the shard in place `shard` of `epoch`."""

    first: int = 0
    epoch: int = 0
    shard: int = 0
    member: int = 0


@dataclass
class Drawn:
    """What went into a rank's part of a batch: texts by kind/source/language, how many of them `max_tokens` cut by
    kind/source, the sum of their tokens and that of the squares (attention's share), and samples that had to be
    replaced; the bytes of remote data that this process fetched since it was last asked; and where the blocks of
    (source, lane) begin that samples of shards without sidecars came from."""

    texts: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    squared_tokens: int = 0
    corrupt: list[Corrupt] = field(default_factory=list)
    fetched: int = 0
    positions: dict[tuple[int, int], Position] = field(default_factory=dict)

    def count_tokens(self, texts: PackedTokens | None) -> None:
        for length in texts.lengths if texts is not None else ():
            self.tokens += length
            self.squared_tokens += length**2

    def add(self, other: Drawn) -> None:
        """Adds what went into another part of the batch."""
        self.texts.update(other.texts)
        self.cut.update(other.cut)
        self.tokens += other.tokens
        self.squared_tokens += other.squared_tokens
        self.corrupt += other.corrupt
        self.fetched += other.fetched
        self.positions |= other.positions

    def of_sources(self, sources: Sequence[str]) -> list[int]:
        """Texts from each of `sources` (kind/source), and then how many of these were cut."""
        drawn = Counter[str]()
        for name, count in self.texts.items():
            drawn[name.rpartition("/")[0]] += count
        return [*(drawn[source] for source in sources), *(self.cut[source] for source in sources)]
