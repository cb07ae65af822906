"""A batch in pieces: what a worker makes and hands over at a time.

Whole batches of hundreds of megabytes, some of them ahead for each worker of each rank, would need more shared memory
than machines have. So every worker makes some samples of every batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset as TorchDataset

PIECE = 16 * 2**20
"""Bytes of a piece, at most, as far as a single sample has no more."""

IMAGES = 64
"""Images of a piece, at most: a second's work for photographs of 2,000 pixels, however small they are made. So the
first batch, and the first one after a resume, is the work of all workers."""

_Item = TypeVar("_Item")


class BatchesInPieces(TorchDataset[_Item], Generic[_Item], ABC):
    """Batches that are made in pieces; item n is joined from those of batch n, whoever made them."""

    @abstractmethod
    def pieces(self, step: int) -> int:
        """How many pieces a step's batch has, at least one."""

    @abstractmethod
    def piece(self, step: int, number: int) -> Any:
        """One of them."""

    @abstractmethod
    def joined(self, step: int, pieces: Iterable[Any]) -> _Item:
        """The batch, from all of its pieces in their order."""

    def piece_bytes(self, step: int) -> int:
        """Bytes of a piece that travel through shared memory; 0 if they are few."""
        return 0

    def __getitem__(self, step: int) -> _Item:
        return self.joined(step, (self.piece(step, number) for number in range(self.pieces(step))))


class Whole(BatchesInPieces[_Item]):
    """Batches so small that each is one piece.

    Args:
        batches: items by step.
    """

    def __init__(self, batches: Any):
        self.batches = batches

    def pieces(self, step: int) -> int:
        return 1

    def piece(self, step: int, number: int) -> Any:
        return self.batches[step]

    def joined(self, step: int, pieces: Iterable[Any]) -> _Item:
        (item,) = pieces
        whole: _Item = item
        return whole
