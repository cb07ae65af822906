"""Pairs and groups against scipy's connected components, in one part or many, in memory or on the disk."""

from __future__ import annotations

import numpy as np
import pytest
from data_prep.curation import minhash
from data_prep.curation.minhash import PERMUTATIONS, Signatures, near_duplicates, signatures
from data_prep.curation.passes import save
from data_prep.curation.signature_store import SignatureStore, arrays_of
from data_prep.groups import first_of_group, join, pairs_of_equals
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


def test_near_duplicates_are_the_connected_components_of_all_that_is_alike_in_a_band():
    found = synthetic(400)
    pairs = [
        (one, two)
        for band in range(minhash.BANDS)
        for bucket in (np.flatnonzero(found.bands[:, band] == hash_) for hash_ in np.unique(found.bands[:, band]))
        for place, two in enumerate(bucket)
        for one in {bucket[0], bucket[max(0, place - 1)]} - {two}
        if ((found.low[one] == found.low[two]).mean() - 1 / 256) / (1 - 1 / 256) >= 0.6
    ]
    assert len(pairs) > 50
    assert (near_duplicates(found, similarity=0.6) == smallest_connected(400, np.array(pairs))).all()


def test_signatures_on_the_disk_give_the_groups_that_those_in_memory_give(monkeypatch, tmp_path):
    monkeypatch.setattr(minhash, "_PAIRS", 13)
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
