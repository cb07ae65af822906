"""A sample's image and texts, out of the members that its shard holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from data_prep.shards import Dataset, ShardError, Unusable, content_of, negative_images
from vision_tower import load_pixels

from stage_trainer.data.stateless_rng import key
from stage_trainer.errors import UserError
from stage_trainer.recipe.limits import MAX_PIXELS

REPLACEMENTS = 16
"""So many samples in a row may be corrupt before a source is given up."""

IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")


def image_of(members: dict[str, bytes]) -> bytes | None:
    """The encoded image among a sample's members, if there is one."""
    return next((members[k] for k in IMAGE_TYPES if k in members), None)


def texts_of(data: Dataset, index: int, members: dict[str, bytes]) -> dict[str, Any]:
    """A sample's texts, as `data_prep.shards.content_of` finds them usable, and the `item` that it is of: a sample
    without `item` is one of its own.

    Raises:
        ShardError: a sample that is not of the data set's kind; names it.
    """
    name = data.row(index).key
    try:
        content = content_of(data.kind, members)
    except Unusable as error:
        raise ShardError(f"{data.directory}: sample {name}: {error}") from error
    return {"item": f"{data.source}/{data.row(index).item}", **content}


@contextlib.contextmanager
def shard_errors_explained() -> Iterator[None]:
    """UserError, in its own words, where a data set is missing or damaged; also a decorator."""
    try:
        yield
    except (ShardError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


class SampleCache:
    """Decoded samples, kept until `megabytes` are full; what came first stays, so small data sets are decoded once.
    An image of more than `max_pixels` is refused by its header. `negatives`: decodes hard-negative images, too.

    Images are decoded at their full size. Decoded at half of it, 3 % of a photograph's values and 25 % of a page of
    text's are more than one level off after the resize (2,000 pixels to 224, `benchmarks/loader.py`)."""

    def __init__(self, megabytes: int, max_pixels: int = MAX_PIXELS, *, negatives: bool = True):
        self.left, self.max_pixels, self.negatives = megabytes * 2**20, max_pixels, negatives
        self.kept: dict[tuple[Path, int], tuple[torch.Tensor | None, dict[str, Any]]] = {}

    def sample(self, data: Dataset, index: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """(uint8 pixels [3, H, W] if there is an image, the texts) of a sample; with hard-negative images also their
        pixels, `negative_images`. Errors as `load_image`, `texts_of`."""
        if (found := self.kept.get((data.directory, index))) is not None:
            return found
        members = data.read(index)
        image = image_of(members)
        pixels = None if image is None else self._pixels(data, index, image)
        content = texts_of(data, index, members)
        negatives = negative_images(data.kind, members) if self.negatives else ()
        more = [self._pixels(data, index, negative) for negative in negatives]
        found = pixels, {**content, "negative_images": more} if more else content
        decoded = sum(each.numel() for each in (*more, *([] if pixels is None else [pixels])))
        cost = sum(map(len, members.values())) * 4 + decoded
        if cost <= self.left:
            self.left -= cost
            self.kept[data.directory, index] = found
        return found

    def _pixels(self, data: Dataset, index: int, image: bytes) -> torch.Tensor:
        return load_pixels(image, name=f"{data.directory}, sample {data.row(index).key}", max_pixels=self.max_pixels)


class TextsAlone:
    """In the place of a `SampleCache` of captioned images whose pixels nothing reads."""

    def sample(self, data: Dataset, index: int) -> tuple[None, dict[str, Any]]:
        """As `SampleCache.sample`."""
        return None, texts_of(data, index, data.read(index))


def replacement(data: Dataset, index: int, attempt: int, whole_shard: bool) -> int:
    """The sample that takes the place of `index`: another of its shard, which is at hand; where that did not help, or
    there is none, one of another shard, the same for all of its samples, so that a shard that is gone does not cost
    many others. It is `index` itself in a data set of one sample alone."""
    shard = data.shard_of(index)
    seed = key("replacement", data.kind, data.source, attempt)
    if whole_shard or attempt > 1 or len(data.samples_of(shard)) == 1:
        shard = another(shard, len(data.shard_sizes), key(seed, shard))
    samples = data.samples_of(shard)
    if index not in samples:
        return samples[key(seed, index) % len(samples)]
    return samples[another(index - samples.start, len(samples), key(seed, index))]


def another(number: int, count: int, draw: int) -> int:
    """One of `count` numbers, drawn, but not `number`; that one if there is no other."""
    return (number + 1 + draw % max(1, count - 1)) % count
