"""Pairs and groups against scipy's connected components, in one part or many, in memory or on the disk."""

from __future__ import annotations

import numpy as np
import pytest
from data_prep.curation import minhash
from data_prep.curation.minhash import PERMUTATIONS, Signatures, near_duplicates, signatures
from data_prep.curation.passes import save
from data_prep.curation.signature_store import SignatureStore, arrays_of
from data_prep.groups import fallen, first_of_group, join, pairs_of_equals, shared
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_prep import groups


def smallest_connected(count: int, pairs: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    return np.array([np.flatnonzero(labels == label)[0] for label in labels])


def test_the_first_of_the_group_stays_whatever_the_order_of_the_pairs():
    pairs = np.array([[5, 6], [0, 3], [3, 6], [1, 2]])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        assert first_of_group(8, pairs[order]).tolist() == [0, 1, 1, 0, 4, 0, 0, 7]
    assert first_of_group(3, np.zeros((0, 2), int)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("part", [1, 7, 1000])
def test_equal_hashes_are_one_group_in_parts_of_any_size(monkeypatch, part):
    monkeypatch.setattr(groups, "_AT_A_TIME", part)
    for count in (0, 1, 300):
        hashes = np.random.default_rng(count).integers(0, 90, count).astype(np.uint64)
        first = np.arange(count)
        for pairs in pairs_of_equals(hashes):
            assert (hashes[pairs[:, 0]] == hashes[pairs[:, 1]]).all()
            assert (pairs[:, 0] < pairs[:, 1]).all()
            join(first, pairs)
        assert first.tolist() == [int(np.flatnonzero(hashes == one)[0]) for one in hashes]


def test_groups_that_are_joined_bit_by_bit_are_connected_components():
    draw = np.random.default_rng(4)
    pairs = draw.integers(0, 500, (300, 2))
    first = np.arange(500)
    for part in np.split(pairs, [10, 11, 200]):
        join(first, part)
    assert (first == smallest_connected(500, pairs)).all()


def synthetic(count: int) -> Signatures:
    """Signatures that often share a band, some of them alike and some not."""
    draw = np.random.default_rng(5)
    low = draw.integers(0, 256, (40, PERMUTATIONS), np.uint8)[draw.integers(0, 40, count)]
    low = np.where(draw.random(low.shape) < draw.random((count, 1)) * 0.5, draw.integers(0, 256, low.shape), low)
    return Signatures(draw.integers(0, count // 3, (count, minhash.BANDS)).astype(np.uint64), low.astype(np.uint8))


def test_what_falls_is_what_falls_by_brute_force():
    draw = np.random.default_rng(6)
    buckets, like = draw.integers(0, 12, (80, 3)), draw.random((80, 80)) < 0.3
    expected = np.arange(80)
    for item in range(80):
        near = [n for n in range(item) if expected[n] == n and set(buckets[n]) & set(buckets[item]) and like[item, n]]
        expected[item] = near[0] if near else item
    found = np.arange(80)
    items = np.repeat(np.arange(80), 3)

    def alike(item, near):
        assert (np.diff(near) > 0).all()
        return next((int(n) for n in near if like[item, n]), -1)

    for item, other in fallen(items, buckets.ravel(), alike):
        found[item] = other
    assert (found == expected).all()
    assert (found != np.arange(80)).sum() > 20


@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_buckets_hold_all_whose_hash_another_has(count):
    hashes = np.random.default_rng(count).integers(0, 120, count).astype(np.uint64)
    items, buckets = shared(hashes)
    assert sorted(items.tolist()) == [n for n in range(count) if (hashes == hashes[n]).sum() > 1]
    together = {
        (one, two)
        for one, b in zip(items, buckets, strict=True)
        for two, c in zip(items, buckets, strict=True)
        if b == c
    }
    assert together == {(one, two) for one in items for two in items if hashes[one] == hashes[two]}


def test_signatures_on_the_disk_give_the_groups_that_those_in_memory_give(tmp_path):
    found = synthetic(400)
    files = []
    for number, place in enumerate(([0, 150], [150, 150], [150, 400])):  # one of them of no text
        part = Signatures(found.bands[slice(*place)], found.low[slice(*place)])
        files.append(tmp_path / f"{number}.npz")
        save(files[-1], **arrays_of("query", part), **arrays_of("target", signatures(["x"])))
    with SignatureStore(files, "query") as stored:
        assert len(stored) == 400
        assert (near_duplicates(stored, similarity=0.6) == near_duplicates(found, similarity=0.6)).all()
    assert sorted(tmp_path.iterdir()) == files  # nothing else stays
