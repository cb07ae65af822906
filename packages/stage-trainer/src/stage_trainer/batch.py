"""What travels from the data to the towers and from there to the loss, and how it is cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Protocol, TypeVar

import torch
from text_tower import MaskedTokens, PackedTokens
from text_tower.packed import to_device
from torch import Tensor

_Moved = TypeVar("_Moved", covariant=True)


class Uploadable(Protocol[_Moved]):
    """A part of a batch of any task: a dataclass of tensors, perhaps of others of tensors."""

    def to(self, device: torch.device) -> _Moved:
        """The same on a device."""


@dataclass(frozen=True)
class Part:
    """Images and texts to embed in one forward pass.

    Attributes:
        images: uint8 `[I, 3, R, R]`, already augmented; of a frozen tower its embeddings, float32 `[I, D]`; or None.
        image_seeds: `[I]` int64, the seed of each image's patch dropout.
        texts: in one packed sequence; of a frozen tower their embeddings, float32 `[N, D]`; or None.
        text_seeds: int64, one for each text, for dropout.
    """

    images: Tensor | None
    image_seeds: Tensor
    texts: PackedTokens | Tensor | None
    text_seeds: Tensor

    def to(self, device: torch.device) -> Part:
        return Part(
            None if self.images is None else to_device(self.images, device),
            to_device(self.image_seeds, device),
            self.texts.to(device, non_blocking=True) if self.texts is not None else None,
            to_device(self.text_seeds, device),
        )


@dataclass(frozen=True)
class Batch(Part):
    """One rank's part of a global batch: I image-caption pairs and P text pairs with K hard negatives each.

    Its images are the I of the captions and perhaps more, I at a time: in a unified batch with views a view of each,
    then another; with M hard-negative images for each caption the first of each, then the second. Its texts are I
    captions, P queries, P targets and P·K hard negatives, in this order. Images or captions that no loss reads are left
    out.

    Attributes:
        image_ids: `[I]` int64, equal for samples that show the same item.
        pairs: P.
        negatives: K.
        text_ids: `[P]` int64, equal for pairs about the same item.
        scores: `[P]` float64, how alike the texts of a pair are; None of pairs that are not graded.
        teacher: what a teacher says, float32, by what it says it of: of each pair of "texts" `[P, T]`, of the "images"
            or their "captions" `[I, T]`; empty without one.
        image_negatives: M.
    """

    image_ids: Tensor
    pairs: int
    negatives: int
    text_ids: Tensor
    scores: Tensor | None = None
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    image_negatives: int = 0

    @property
    def captions(self) -> int:
        """How many of its texts are captions."""
        return len(self.text_seeds) - self.pairs * (2 + self.negatives)


@dataclass(frozen=True)
class Embedded:
    """What a part became: images `[I, D]` and texts `[N, D]`, float32, and `scalars`, `[1]` each: ln(1 / temperature)
    of each task by its name, a sigmoid loss's bias by `TASK_bias`. They are apart, so that those of a task that rests
    get no gradient, rather than zeros."""

    images: Tensor
    texts: Tensor
    scalars: dict[str, Tensor]


@dataclass(frozen=True)
class MaskedBatch:
    """One rank's part of a global batch of N texts with hidden words, or a chunk of it.

    Attributes:
        masked: the texts, and what was hidden in them.
        seeds: `[N]` int64, for dropout.
    """

    masked: MaskedTokens
    seeds: Tensor

    def to(self, device: torch.device) -> MaskedBatch:
        return MaskedBatch(self.masked.to(device, non_blocking=True), to_device(self.seeds, device))

    def chunks(self, tokens: int) -> Iterator[MaskedBatch]:
        """Consecutive texts with at most `tokens` tokens (0: all in one); a longer text is a chunk of its own."""
        places, labels = self.masked.places, self.masked.labels
        for rows, span, packed in packed_chunks(self.masked.packed, tokens):
            inside = (places >= span.start) & (places < span.stop)
            yield MaskedBatch(MaskedTokens(packed, places[inside] - span.start, labels[inside]), self.seeds[rows])


def tensors_of(batch: object) -> Iterator[Tensor]:
    """All tensors of a batch or a part of one."""
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


def image_chunks(batch: Batch, size: int) -> Iterator[Part]:
    """Parts of at most `size` images (0: all in one)."""
    if batch.images is None:
        return
    size = size or len(batch.images)
    for start in range(0, len(batch.images), size):
        rows = slice(start, start + size)
        yield Part(batch.images[rows], batch.image_seeds[rows], None, batch.text_seeds[:0])


def text_chunks(batch: Batch, tokens: int) -> Iterator[Part]:
    """Parts of consecutive texts with at most `tokens` tokens (0: all in one); a longer text is a part of its own.
    Embeddings from the disk, which cost nothing, are one part."""
    if batch.texts is None:
        return
    if isinstance(batch.texts, Tensor):
        yield Part(None, batch.image_seeds[:0], batch.texts, batch.text_seeds)
        return
    for rows, _, packed in packed_chunks(batch.texts, tokens):
        yield Part(None, batch.image_seeds[:0], packed, batch.text_seeds[rows])


def packed_chunks(texts: PackedTokens, tokens: int) -> Iterator[tuple[slice, slice, PackedTokens]]:
    """(which texts, which of all their tokens, these packed) of each part of `texts`."""
    lengths, bounds = texts.lengths, texts.cu_seqlens
    start = 0
    while start < len(lengths):
        stop, held = start + 1, lengths[start]
        while stop < len(lengths) and (not tokens or held + lengths[stop] <= tokens):
            held, stop = held + lengths[stop], stop + 1
        first = int(bounds[start])
        ids, cu_seqlens = texts.ids[first : first + held], bounds[start : stop + 1] - first
        yield slice(start, stop), slice(first, first + held), PackedTokens(ids, cu_seqlens, max(lengths[start:stop]))
        start = stop
