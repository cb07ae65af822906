"""Dropout belongs to the sample."""

import pytest
import torch
from text_tower.dropout import KeyedDropout

LENGTHS = [7, 1, 30, 7, 3, 12]
SEEDS = torch.tensor([3, -1, 2**62, 4, 0, 99])


def test_a_sample_drops_the_same_in_any_batch(make_tower, pack):
    tower, packed = make_tower(dropout=0.4).double(), pack(LENGTHS)
    together = tower(packed, sample_seeds=SEEDS)
    sequences = [s.tolist() for s in packed.ids.split(LENGTHS)]
    for chosen in ([5, 0, 3], [2], [4, 1]):
        part = tower(type(packed).from_lists([sequences[i] for i in chosen]), sample_seeds=SEEDS[chosen])
        torch.testing.assert_close(part, together[chosen], rtol=1e-12, atol=1e-12)


def test_another_seed_drops_otherwise_and_evaluation_drops_nothing(make_tower, pack):
    tower, packed = make_tower(dropout=0.4), pack(LENGTHS)
    first, second = tower(packed, sample_seeds=SEEDS), tower(packed, sample_seeds=SEEDS + 1)
    assert ((first - second).abs().amax(1) > 1e-3).all()
    assert torch.equal(tower.eval()(packed), make_tower()(packed))


def test_equal_texts_with_different_seeds_differ(make_tower, pack):
    tower, packed = make_tower(dropout=0.4), pack([9])
    twice = type(packed).from_lists([packed.ids.tolist()] * 2)
    a, b = tower(twice, sample_seeds=torch.tensor([1, 2]))
    assert (a - b).abs().max() > 1e-3


def test_every_place_of_use_drops_on_its_own(make_tower, pack, monkeypatch):
    sites, at = [], KeyedDropout.at
    monkeypatch.setattr(KeyedDropout, "at", lambda self, site: sites.append(site) or at(self, site))
    make_tower(dropout=0.1, layers=3)(pack(LENGTHS), sample_seeds=SEEDS)
    assert sites == list(range(7))  # the embeddings, then attention and MLP of each block


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_kept_is_right_and_no_axis_shows_a_pattern(p):
    tokens, channels = 512, 256
    dropout = KeyedDropout(p, torch.arange(tokens) // 32, torch.arange(tokens) % 32)
    keep = torch.stack([dropout.at(site).keep(channels) for site in range(4)]).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / keep.numel() ** 0.5
    for axis in range(3):  # the mean over two axes, for each site, token and channel
        means = keep.mean([a for a in range(3) if a != axis])
        assert (means - (1 - p)).abs().max() < 5 * sigma / (keep.numel() / keep.shape[axis]) ** 0.5
    centred = (keep - (1 - p)) / sigma
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(32, 1), centred.roll(1, 2)):
        assert abs((centred * shifted).mean()) < 5 / keep.numel() ** 0.5


def test_kept_elements_are_scaled_so_that_the_mean_stays():
    dropout = KeyedDropout(0.25, torch.zeros(400, dtype=torch.int64), torch.arange(400))
    out = dropout.at(0)(torch.ones(400, 100))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_training_with_dropout_asks_for_seeds(make_tower, pack):
    tower = make_tower(dropout=0.1)
    with pytest.raises(ValueError, match="needs sample_seeds"):
        tower(pack([3]))
    with pytest.raises(ValueError, match=r"expected torch.int64 \[2\]"):
        tower(pack([3, 4]), sample_seeds=torch.zeros(2))
