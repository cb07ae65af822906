"""Images that are the same, or nearly: by their bytes, or by perceptual hash, colours and then pixels."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from data_prep.curation import passes
from data_prep.curation.phash import UNREADABLE, buckets_within, perceptual_hash
from data_prep.curation.verdicts import BROKEN, KEPT, NEAR, Verdicts
from data_prep.execute import Output
from data_prep.groups import fallen
from data_prep.images import STORED
from data_prep.shards.format import JsonObject

_SIDE = 16
# Grey levels by which two small copies may differ, in the mean and in one place. JPEG at quality 60 makes a mean of up
# to 5; flags in other colours, or drawings with another small part, differ by more in some place.
_MEAN, _MOST = 6, 32
# What is alike in that is decoded once more: larger copies, blurred by a pixel, may differ in the mean of a block of
# 8 x 8 by so much. JPEG at quality 40 or another size make up to 19; two labels that differ in a digit, 21 and more.
_LARGE, _BLOCK, _MOST_IN_A_BLOCK = 256, 8, 20
_AT_HAND = 256  # decoded images, some 200 kB each


def sign(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The survey: a key of each image's bytes, its perceptual hash, and a copy of 16 x 16 pixels."""
    exact, hashes, small, broken = [], [], [], []
    for sample in passes.samples_of(piece):
        output.came_in()
        digest = hashlib.sha256(sample.image).digest()
        exact.append(np.frombuffer(digest[:16], np.uint64))
        found, copy = None, np.zeros((_SIDE, _SIDE, 3), np.uint8)
        try:
            with Image.open(io.BytesIO(sample.image), formats=STORED) as image:
                found = perceptual_hash(image)
                copy = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX))
            broken.append(False)
        except UNREADABLE:
            broken.append(True)
        hashes.append(found)
        small.append(copy)
    passes.save(
        Path(piece["survey"]),
        exact=np.array(exact, np.uint64).reshape(-1, 2),
        hashes=np.array([found or 0 for found in hashes], np.uint64),
        hashed=np.array([found is not None for found in hashes], bool),
        small=np.array(small, np.uint8).reshape(-1, _SIDE, _SIDE, 3),
        broken=np.array(broken, bool),
    )


def decide(files: Sequence[Path], tests: int, distance: int, samples: passes.Numbered) -> tuple[Verdicts, list[int]]:
    """The verdicts by the survey's files, of which the first `tests` are those of evaluation sets; sizes of the others.

    Args:
        distance: images whose hashes differ in at most so many bits are looked at again; -1: none.
        samples: of all the files.
    """
    found = [passes.load(file) for file in files]
    sizes = [len(part["hashes"]) for part in found]
    exact, hashes, hashed, small, broken = (
        np.concatenate([part[name] for part in found]) for name in ("exact", "hashes", "hashed", "small", "broken")
    )
    verdicts = Verdicts(len(exact), sum(sizes[:tests]))
    verdicts.what[np.flatnonzero(broken[verdicts.begin :]) + verdicts.begin] = BROKEN
    verdicts.equals(exact)
    if distance >= 0:
        places = np.flatnonzero(hashed & (verdicts.what == KEPT))
        items, buckets = buckets_within(hashes[places], distance)
        same_pixels = _comparison(samples)

        def alike(item: int, near: np.ndarray) -> int:
            if item < verdicts.begin:  # those of evaluation sets all stay
                return -1
            apart = np.abs(small[near].astype(np.int16) - small[item]).reshape(len(near), -1)
            same = (apart.mean(axis=1) <= _MEAN) & (apart.max(axis=1) <= _MOST)
            return next((other for other in near[same].tolist() if same_pixels(item, other)), -1)

        pairs = np.array(list(fallen(places[items], buckets, alike)), np.int64).reshape(-1, 2)
        verdicts.fall(pairs[:, 0], pairs[:, 1], NEAR)
    verdicts.settle()
    return verdicts, sizes[tests:]


def _comparison(samples: passes.Numbered) -> Callable[[int, int], bool]:
    """Whether two images have nearly the same pixels, at the size of the smaller one."""

    @functools.lru_cache(_AT_HAND)
    def copy(number: int) -> Image.Image:
        with Image.open(io.BytesIO(samples.sample(number).image), formats=STORED) as image:
            size = min(image.width, _LARGE), min(image.height, _LARGE)
            return image.convert("RGB").resize(size, Image.Resampling.BOX)

    def alike(one: int, other: int) -> bool:
        copies = copy(one), copy(other)
        size = min(image.width for image in copies), min(image.height for image in copies)
        blurred = (image.resize(size, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(1)) for image in copies)
        first, second = (np.asarray(image, np.int16) for image in blurred)
        apart = np.abs(first - second).mean(axis=2)
        rows, columns = (np.arange(0, length, _BLOCK) for length in apart.shape)
        sums = np.add.reduceat(np.add.reduceat(apart, rows, axis=0), columns, axis=1)
        counts = np.outer(np.diff(rows, append=apart.shape[0]), np.diff(columns, append=apart.shape[1]))
        return bool((sums / counts).max() <= _MOST_IN_A_BLOCK)

    return alike
