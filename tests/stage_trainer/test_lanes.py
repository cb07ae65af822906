"""The order of one source in lanes."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_trainer.data.lanes import WINDOW, SourceOrder, spread

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)
LANES = st.integers(1, 12)


def epoch_of(order, number):
    index, epoch = order.part(number * order.samples, (number + 1) * order.samples, 0, order.samples)
    assert set(epoch.tolist()) == {number}
    return index


@given(sizes=SIZES, lanes=LANES, seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_every_epoch_shows_every_sample_once(sizes, lanes, seed):
    """So that no sample is drawn more often than another, whatever the sizes of shards."""
    order = SourceOrder(sizes, seed, lanes)
    for number in range(2):
        assert sorted(epoch_of(order, number).tolist()) == list(range(sum(sizes)))


@given(
    sizes=SIZES, lanes=LANES, bounds=st.tuples(st.integers(0, 500), st.integers(0, 500)), cuts=st.lists(st.floats(0, 1))
)
@settings(max_examples=100, deadline=None)
def test_parts_are_pieces_of_the_whole_and_the_whole_is_all_of_its_positions(sizes, lanes, bounds, cuts):
    order, (start, stop) = SourceOrder(sizes, 7, lanes), sorted(bounds)
    index, epoch = order.part(start, stop, 0, stop - start)
    places = [0, *sorted(int(cut * (stop - start)) for cut in cuts), stop - start]
    assert [
        i for low, high in pairwise(places) for i in order.part(start, stop, low, high)[0].tolist()
    ] == index.tolist()
    alone = [order.part(position, position + 1, 0, 1) for position in range(start, stop)]
    assert Counter(zip(index.tolist(), epoch.tolist(), strict=True)) == Counter(
        (int(i[0]), int(e[0])) for i, e in alone
    )
    assert [e for _, e in alone] == [position // order.samples for position in range(start, stop)]


@given(sizes=SIZES, lanes=LANES, start=st.integers(0, 500), count=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_a_batch_takes_equally_much_from_every_lane(sizes, lanes, start, count):
    order = SourceOrder(sizes, 7, lanes)
    counts, within = order.counts(start, start + count), start % order.samples + count <= order.samples
    assert counts.sum() == count
    if within:  # at the end of an epoch lanes with one sample less have their turns left out
        assert counts.max() - counts.min() <= 1


def test_epochs_and_seeds_differ_in_order():
    for lanes in (1, 2):
        one, two = SourceOrder([50, 50], 1, lanes), SourceOrder([50, 50], 2, lanes)
        orders = [epoch_of(one, 0).tolist(), epoch_of(one, 1).tolist(), epoch_of(two, 0).tolist()]
        assert orders[0] != orders[1]
        assert orders[0] != orders[2]


def test_every_batch_mixes_the_windows_of_all_lanes_and_four_shards_at_least():
    for lanes, shards in ((1, 12), (2, 12), (3, 12), (4, 12), (8, 12), (64, 40), (64, 2)):
        order = SourceOrder([100] * shards, 3, lanes)
        assert order.lanes == min(lanes, shards)
        assert order.lanes * order.window >= WINDOW
        index, _ = order.part(0, 4 * order.lanes * order.window, 0, 4 * order.lanes * order.window)
        assert len(set((index // 100).tolist())) >= min(order.lanes * order.window, shards) * 0.7


def test_the_samples_of_one_or_two_shards_are_all_mixed():
    for shards in (1, 2):
        order = SourceOrder([200 // shards] * shards, 5, 64)
        gaps = np.abs(np.diff(np.argsort(np.concatenate([order.part(p, p + 1, 0, 1)[0] for p in range(200)]))))
        assert 50 < gaps.mean() < 84  # of a random order 67


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12, 40, 61, 64, 1000])
def test_turns_are_spread_over_the_row(count):
    order = spread(count)
    assert sorted(order.tolist()) == list(range(count))
    power = 1
    while count % power == 0:
        for start in range(3 * count):
            run = order[np.arange(start, start + power) % count]
            assert sorted((run * power // count).tolist()) == list(range(power))
        power *= 2


@given(sizes=SIZES, lanes=LANES, start=st.integers(0, 300), count=st.integers(1, 200), world=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_shards_ahead_are_those_that_are_read(sizes, lanes, start, count, world):
    order = SourceOrder(sizes, 3, lanes)
    index, _ = order.part(start, start + count, 0, count)
    read = order.shards_of(index).tolist()
    bounds = np.cumsum(sizes)
    assert set(read) == {int(np.searchsorted(bounds, i, side="right")) for i in index.tolist()}
    ahead = [order.ahead(start, start + count, rank, world) for rank in range(world)]
    assert set(read) <= {shard for of in ahead for shard in of}
    assert all(len(set(of)) == len(of) and all(sizes[shard] for shard in of) for of in ahead)


def test_the_windows_that_are_read_now_are_ahead_of_the_next_ones():
    order = SourceOrder([10] * 12, 3, 4)
    now = order.shards_of(order.part(0, 40, 0, 40)[0]).tolist()
    ahead = order.ahead(0, 1, 0, 1)
    assert set(ahead[:4]) == set(now)
    assert len(ahead) == 8


def test_another_seed_reads_the_same_shards_on_a_rank():
    """Of the same files; so a stage finds what the one before it fetched."""
    for seed in range(5):
        found = {frozenset(SourceOrder([10] * 12, seed, lanes).ahead(0, 120, 1, 4)) for lanes in (4, 12)}
        assert len(found) == 1
        assert len(next(iter(found))) == 3
        assert found == {frozenset(SourceOrder([10] * 12, 99, 4).ahead(0, 120, 1, 4))}
