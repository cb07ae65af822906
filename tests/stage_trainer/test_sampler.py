from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stage_trainer.data.lanes import SourceOrder
from stage_trainer.data.sampler import TaskSampler, apportioned
from stage_trainer.data.stateless_rng import key, permutation


def sampler(rates=(0.7, 0.2, 0.1), batch=8, one_source=False, lanes=64):
    orders = [
        SourceOrder([10, 20, 5, 7, 9, 3], 1, lanes),
        *(SourceOrder([100 // n], n, lanes) for n in range(1, 6)),
    ]
    return TaskSampler(orders[: len(rates)], rates, batch, one_source=one_source)


def whole(sample, n, rank=0, world=1):
    part = sample.part(n, rank, world)
    return part.within(0, len(part))


def test_a_batch_is_a_function_of_its_number():
    walked = sampler()
    straight = [whole(walked, n) for n in range(40)]
    jumped = sampler()
    for n in (39, 3, 17, 18, 0):
        assert whole(jumped, n) == straight[n]


def test_batches_follow_one_another_in_each_source():
    sample = sampler()
    found = [Counter(), Counter(), Counter()]
    for n in range(40):
        for draw in whole(sample, n):
            found[draw.source][draw.index, draw.epoch] += 1
    for source, order in enumerate(sample.orders):
        index, epoch = order.part(0, found[source].total(), 0, found[source].total())
        assert found[source] == Counter(zip(index.tolist(), epoch.tolist(), strict=True))


@example(rates=[0.3, 0.01, 1, 0.3, 0.01], batch=9)
@given(rates=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), batch=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_sources_keep_to_their_rates(rates, batch):
    sample = sampler(rates, batch)
    counts: Counter[int] = Counter()
    for n in range(30):
        draws = whole(sample, n)
        assert len(draws) == batch
        counts.update(d.source for d in draws)
    for source, rate in enumerate(rates):
        assert abs(counts[source] - 30 * batch * rate / sum(rates)) <= 2 * sample.unit
    assert sample.unit == batch or sample.unit * 8 * len(rates) <= max(batch, 8 * len(rates))


@example(shares=[0.5] + [0.01] * 50, total=5000)
@given(shares=st.lists(st.floats(0.001, 1), min_size=1, max_size=40), total=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_turns_add_up_and_none_is_taken_back(shares, total):
    shares = np.array(shares) / sum(shares)
    before, after = apportioned(shares, total), apportioned(shares, total + 1)
    assert before.sum() == total
    assert sorted((after - before).tolist()) == [0] * (len(shares) - 1) + [1]
    assert np.abs(before - total * shares).max() < 2.5


def test_turns_are_those_of_all_times_in_order():
    shares = np.array([0.31, 0.07, 0.44, 0.18])
    phases = [(0.5 + s * (5**0.5 - 1) / 2) % 1 for s in range(4)]
    order = sorted(((j + phases[s]) / shares[s], s) for s in range(4) for j in range(300))
    for total in range(300):
        assert apportioned(shares, total).tolist() == [sum(s == one for _, one in order[:total]) for s in range(4)]


def test_a_text_batch_comes_from_one_source():
    sample = sampler(one_source=True)
    sources = [{d.source for d in whole(sample, n)} for n in range(100)]
    assert all(len(s) == 1 for s in sources)
    assert Counter(min(s) for s in sources) == {0: 70, 1: 20, 2: 10}
    assert [sample.source_of(n) for n in range(100)] == [min(s) for s in sources]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lanes", [1, 2, 5, 64])
@pytest.mark.parametrize("one_source", [False, True])
def test_ranks_share_a_batch_without_gap_or_overlap(world, lanes, one_source):
    """Whether or not lanes and batch are multiples of the number of ranks, across epochs."""
    sample = sampler(batch=20, lanes=lanes, one_source=one_source)
    for n in (0, 5, 6, 7, 40):
        parts = [whole(sample, n, rank, world) for rank in range(world)]
        assert [len(part) for part in parts] == [len(range(rank, 20, world)) for rank in range(world)]
        together = [d for part in parts for d in part]
        assert sorted(together, key=lambda d: d.source) == whole(sample, n)
        for source in range(3):  # nobody gets the long texts of one source alone
            counts = [sum(d.source == source for d in part) for part in parts]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_read_shards_of_their_own_where_lanes_divide_evenly(world):
    """Sources mix, and their shards are of one size."""
    orders = [SourceOrder([10] * 16, 1, 64), SourceOrder([5] * 64, 2, 16)]
    sample = TaskSampler(orders, [2, 1], 320, one_source=False)
    assert sample.unit == 16
    for source, shards, samples in ((0, 16, 10), (1, 64, 5)):
        found = [set() for _ in range(world)]
        for n in range(12):
            for rank in range(world):
                found[rank] |= {d.index // samples for d in whole(sample, n, rank, world) if d.source == source}
        assert [len(of) for of in found] == [shards // world] * world
        assert len(set.union(*found)) == shards


def test_the_shards_ahead_are_those_of_the_rank():
    orders = [SourceOrder([10] * 16, 1, 64), SourceOrder([5] * 64, 2, 16)]
    sample = TaskSampler(orders, [2, 1], 320, one_source=False)
    for world in (1, 2, 3, 4, 7):
        for n in (0, 1, 5):
            ahead = [sample.shards_ahead(n, rank, world) for rank in range(world)]
            for rank in range(world):
                for number, samples in ((n, (10, 5)), (n + 1, (10, 5))):
                    read = {(d.source, d.index // samples[d.source]) for d in whole(sample, number, rank, world)}
                    there = {(source, shard) for source in (0, 1) for shard in ahead[rank][source]}
                    missing = read - there
                    assert not missing if number == n or world in (1, 2, 4) else len(missing) <= 3
            if world in (2, 4):
                assert sum(len(each[0]) for each in ahead) == 16


def test_keys_are_the_same_on_every_machine():
    assert key("emoji", 3, 0) == 950051301548986882
    assert permutation(6, 42).tolist() == [5, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (50, 42), (300, 2**63 - 1)])
def test_a_permutation_is_the_order_of_splitmix64s_numbers(n, seed):
    """Steele, Lea and Flood (2014), in whole numbers of any size."""

    def mixed(i: int) -> int:
        x = (i * 0x9E3779B97F4A7C15 + seed) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert permutation(n, seed).tolist() == sorted(range(n), key=mixed)


def test_a_permutation_has_no_favourites():
    first = Counter(int(permutation(5, key("p", i))[0]) for i in range(5000))
    assert max(abs(c - 1000) for c in first.values()) < 120
    assert np.array_equal(np.sort(permutation(1000, 7)), np.arange(1000))
