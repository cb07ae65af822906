"""`LossStats`: against whole matrices, against numbers counted by hand, and what a tie is."""

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_losses import matryoshka_info_nce


def close(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_stats_of_three_pairs_counted_by_hand():
    """A tie is a miss: query 1 meets a hard negative that equals its target, and target 0 two equal prefixes."""
    queries = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 3]], requires_grad=True)
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 3]])
    negatives = torch.tensor([[[0, 0, -1.0]], [[0, 1, 0]], [[0, -1, 0]]])
    _, stats = matryoshka_info_nce(
        queries, targets, negatives=negatives, temperature=0.2, dims=(2, 3), return_stats=True
    )
    assert stats.dims == (2, 3)
    # Prefix 2: queries x, y, x; targets x, y, y; negatives 0, y, -y.
    close(stats.query_to_target_accuracy, torch.tensor([1 / 3, 2 / 3]), 1e-6)
    close(stats.target_to_query_accuracy, torch.tensor([1 / 3, 1.0]), 1e-6)
    close(stats.positive_cosine, torch.tensor([2 / 3, (1 + 1 + 0.9) / 3]), 1e-6)
    side = 1 / math.sqrt(10)  # query 2 with target 0; query 0 meets nothing but 0
    close(stats.hardest_negative_cosine, torch.tensor([(0 + 1 + 1) / 3, (0 + 1 + side) / 3]), 1e-6)
    for value in vars(stats).values():
        assert isinstance(value, tuple) or not value.requires_grad


@pytest.mark.parametrize("rows", [5, 40])
def test_stats_of_dims_in_no_order_are_those_of_each_dim_by_full_matrices(rows, make_batch):
    """Unsorted and one dim twice: each figure stands where its dim stands, and is what whole matrices give."""
    queries, targets, negatives = make_batch(rows, width=24, hard=2, seed=3)
    targets = 0.6 * queries.roll(1, 1) + targets  # prefixes that differ in how well they tell pairs apart
    dims, ids = (8, 24, 3, 24, 1, 13), torch.arange(rows) // 2
    weights = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    _, stats = matryoshka_info_nce(
        queries, targets, negatives=negatives, temperature=0.1, dims=dims, query_ids=ids, sample_weights=weights,
        return_stats=True,
    )  # fmt: skip
    assert stats.dims == dims
    share, same = weights / weights.sum(), ids[:, None] == ids
    for k, dim in enumerate(dims):
        q, t, n = (F.normalize(each[..., :dim], dim=-1) for each in (queries, targets, negatives.flatten(0, 1)))
        cosine, hard = q @ t.T, q @ n.T
        own, others = cosine.diagonal(), cosine.masked_fill(same, -2)
        closest = torch.cat([others, hard], dim=1).amax(1)
        assert stats.query_to_target_accuracy[k].item() == pytest.approx(((own > closest) * share).sum().item())
        backward = ((own > others.amax(0)) * share).sum().item()
        assert stats.target_to_query_accuracy[k].item() == pytest.approx(backward)
        assert stats.positive_cosine[k].item() == pytest.approx((own * share).sum().item())
        assert stats.hardest_negative_cosine[k].item() == pytest.approx((closest * share).sum().item())


@pytest.mark.parametrize(("dtype", "tie"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_a_tie_is_a_miss_and_what_is_closer_by_more_than_rounding_is_not(dtype, tie):
    """Two targets at the same cosine from query 0, and one that is nearer or farther by a few roundings."""

    def accuracies(ahead):
        """Query 0 and its own target at a cosine of 0.6 and `ahead` above; target 1 at 0.6, on the other side."""
        cosine = torch.tensor([0.6 + ahead, 0.6], dtype=torch.float64)
        sine = (1 - cosine.square()).sqrt() * torch.tensor([1, -1])
        targets = torch.stack([cosine, sine], dim=1).to(dtype)
        queries = torch.stack([torch.tensor([1.0, 0.0], dtype=dtype), targets[1]])
        _, stats = matryoshka_info_nce(queries, targets, temperature=0.1, return_stats=True)
        _, back = matryoshka_info_nce(targets, queries, temperature=0.1, return_stats=True)
        # The roles exchanged, the same pairs are told apart by target.
        assert stats.query_to_target_accuracy.item() == back.target_to_query_accuracy.item()
        return stats.query_to_target_accuracy.item()

    # Query 1 is its own target, and is always found.
    assert accuracies(0.0) == accuracies(0.4 * tie) == accuracies(-4 * tie) == 0.5
    assert accuracies(4 * tie) == 1.0


def test_equal_targets_are_all_missed_and_equal_ids_are_no_tie(make_batch):
    queries, _ = make_batch(3)
    targets = queries[:1].expand(3, -1).contiguous()
    _, stats = matryoshka_info_nce(queries, targets, temperature=0.1, return_stats=True)
    assert stats.query_to_target_accuracy.item() == 0
    _, stats = matryoshka_info_nce(
        queries, targets, temperature=0.1, query_ids=torch.zeros(3).long(), return_stats=True
    )
    assert stats.query_to_target_accuracy.item() == 1


def test_stats_are_weighted_like_the_loss():
    queries, targets = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    _, stats = matryoshka_info_nce(
        queries, targets, temperature=1.0, sample_weights=torch.tensor([3.0, 1.0, 0.0]), return_stats=True
    )
    assert stats.query_to_target_accuracy.item() == pytest.approx(0.75)
    assert stats.positive_cosine.item() == pytest.approx(0.75)
    assert stats.hardest_negative_cosine.item() == pytest.approx(0.25)


def test_asking_for_stats_changes_neither_loss_nor_gradient(make_batch):
    queries, targets = make_batch(4)
    plain = matryoshka_info_nce(queries, targets, temperature=0.1, dims=(3, 8))
    loss, _ = matryoshka_info_nce(queries, targets, temperature=0.1, dims=(3, 8), return_stats=True)
    assert torch.equal(loss, plain)
    assert torch.equal(torch.autograd.grad(loss, queries)[0], torch.autograd.grad(plain, queries)[0])
