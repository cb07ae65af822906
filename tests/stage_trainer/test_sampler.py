from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stage_trainer.data.sampler import SourceOrder, TaskSampler, slice_of
from stage_trainer.data.stateless_rng import key, permutation


def sampler(rates=(0.7, 0.2, 0.1), batch=8, one_source=False):
    orders = [SourceOrder([10, 20, 5, 7, 9, 3], 1), *(SourceOrder([100 // n], n) for n in range(1, 6))]
    return TaskSampler(orders[: len(rates)], rates, batch, one_source=one_source)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_sample_once(sizes, seed):
    order = SourceOrder(sizes, seed)
    for epoch in range(2):
        seen = [order.at(epoch * order.samples + i) for i in range(order.samples)]
        assert {e for e, _ in seen} == {epoch}
        assert sorted(i for _, i in seen) == list(range(order.samples))


def test_epochs_and_seeds_differ_in_order():
    orders = [
        [SourceOrder([50, 50], seed).at(e * 100 + i)[1] for i in range(100)] for seed, e in ((1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_a_batch_is_a_function_of_its_number():
    walked = sampler()
    straight = [walked.batch_at(n) for n in range(40)]
    jumped = sampler()
    for n in (39, 3, 17, 18, 0):
        assert jumped.batch_at(n) == straight[n]


@example(rates=[0.3, 0.01, 1, 0.3, 0.01], batch=9)  # small ones run ahead of their shares, and a batch would be too big
@given(rates=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), batch=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_sources_keep_to_their_rates(rates, batch):
    sample = sampler(rates, batch)
    counts: Counter[int] = Counter()
    for n in range(30):
        draws = sample.batch_at(n)
        assert len(draws) == batch
        counts.update(d.source for d in draws)
    for source, rate in enumerate(rates):
        assert abs(counts[source] - 30 * batch * rate / sum(rates)) <= 2


def test_a_text_batch_comes_from_one_source():
    sample = sampler(one_source=True)
    sources = [{d.source for d in sample.batch_at(n)} for n in range(100)]
    assert all(len(s) == 1 for s in sources)
    assert Counter(min(s) for s in sources) == {0: 70, 1: 20, 2: 10}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_share_a_batch_without_gap_or_overlap(world):
    draws = sampler(batch=20).batch_at(5)
    parts = [slice_of(draws, rank, world) for rank in range(world)]
    assert sorted((d for part in parts for d in part), key=draws.index) == draws
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for source in range(3):  # nobody gets the long texts of one source alone
        counts = [sum(d.source == source for d in part) for part in parts]
        assert max(counts) - min(counts) <= 1


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
