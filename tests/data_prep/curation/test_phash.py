"""Perceptual hashes against ImageHash, and the pairs within a distance against comparing all with all."""

from __future__ import annotations

import io
import itertools

import imagehash
import numpy as np
import pytest
from data_prep.curation.phash import buckets_within, pairs_within, perceptual_hash
from PIL import Image

from .conftest import encoded, photo


def test_the_hash_is_that_of_imagehash():
    for seed in range(50):
        image = photo(seed, 40 + seed)
        assert f"{perceptual_hash(image):016x}" == str(imagehash.phash(image))


def test_encoding_and_size_hardly_change_it_and_another_photo_does():
    for seed in range(20):
        original = perceptual_hash(photo(seed, 300))
        jpeg = Image.open(io.BytesIO(encoded(photo(seed, 300), "JPEG", quality=40)))
        assert (original ^ perceptual_hash(jpeg)).bit_count() <= 4
        assert (original ^ perceptual_hash(photo(seed, 300).resize((120, 120)))).bit_count() <= 4
        assert (original ^ perceptual_hash(photo(seed + 100, 300))).bit_count() > 12


def test_a_plain_colour_has_none():
    assert perceptual_hash(Image.new("RGB", (50, 50), (200, 10, 10))) is None


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 11])
def test_all_pairs_within_the_distance_are_found(distance):
    draw = np.random.default_rng(distance)
    hashes = draw.integers(0, 2**64, 300, np.uint64)
    for _ in range(300):  # near ones, with up to 12 bits changed
        bits = draw.choice(64, draw.integers(0, 13), replace=False)
        mask = np.uint64(sum(1 << int(bit) for bit in bits))
        hashes = np.append(hashes, hashes[draw.integers(0, len(hashes))] ^ mask)
    different = np.unique(hashes)
    ones, twos = np.triu_indices(len(different), 1)
    near = np.bitwise_count(different[ones] ^ different[twos]) <= distance
    expected = set(zip(ones[near].tolist(), twos[near].tolist(), strict=True))
    assert {tuple(pair) for pair in pairs_within(different, distance).tolist()} == expected
    items, buckets = buckets_within(hashes, distance)
    together = {
        tuple(sorted((int(one), int(two))))
        for bucket in np.unique(buckets)
        for one, two in itertools.combinations(items[buckets == bucket], 2)
    }
    ones, twos = np.triu_indices(len(hashes), 1)
    near = np.bitwise_count(hashes[ones] ^ hashes[twos]) <= distance
    assert together == set(zip(ones[near].tolist(), twos[near].tolist(), strict=True))


def test_many_equal_hashes_cost_no_square():
    items, buckets = buckets_within(np.full(200_000, 12345, np.uint64), 4)
    assert len(items) == 200_000
    assert not buckets.any()


def test_a_small_block_gives_the_same_pairs(monkeypatch):
    hashes = np.unique(np.random.default_rng(0).integers(0, 2**18, 500, np.uint64))
    whole = pairs_within(hashes, 4)
    monkeypatch.setattr("data_prep.curation.phash._PAIRS_AT_A_TIME", 17)
    assert (pairs_within(hashes, 4) == whole).all()
    assert len(pairs_within(hashes[:0], 4)) == 0
