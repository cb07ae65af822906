"""CoSENT against a sum over all pairs of pairs, against sentence-transformers, and at its edges."""

import pytest
import torch
from contrastive_losses import matryoshka_cosent
from contrastive_losses.plain import plain_cosent


def draw(rows, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    return *pairs, torch.randint(0, 6, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [2, 3, 40])
def test_a_running_sum_is_the_sum_over_all_pairs_of_pairs_with_its_gradients(rows):
    *pairs, scores = draw(rows)
    temperature = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    options = {"temperature": temperature, "dims": (6, 2), "weights": (1.0, 3.0)}
    ours, plain = matryoshka_cosent(*pairs, scores, **options), plain_cosent(*pairs, scores, **options)
    torch.testing.assert_close(ours, plain.squeeze(), rtol=1e-12, atol=0)
    inputs = [*pairs, temperature]
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), rtol=1e-10, atol=1e-13
    )
    assert torch.autograd.gradcheck(lambda *x: matryoshka_cosent(*x[:2], scores, temperature=x[2]), inputs)


def test_it_is_sentence_transformers_loss():
    from sentence_transformers.sentence_transformer import losses

    *pairs, scores = draw(30)
    peer = losses.CoSENTLoss(torch.nn.Identity(), scale=20.0)
    theirs = peer.compute_loss_from_embeddings(list(pairs), scores.double())
    ours = matryoshka_cosent(*pairs, scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, pairs), torch.autograd.grad(theirs, pairs), rtol=1e-10, atol=1e-13
    )


def test_only_the_order_of_scores_counts_and_equal_ones_are_not_compared():
    *pairs, scores = draw(20)
    loss = matryoshka_cosent(*pairs, scores)
    assert torch.equal(matryoshka_cosent(*pairs, scores * 0.1 - 7), loss)
    equal = matryoshka_cosent(*pairs, torch.ones(20))
    assert equal.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(equal, pairs))
    assert matryoshka_cosent(*(p[:1] for p in pairs), scores[:1]).item() == 0


def test_extreme_cosines_zero_rows_and_half_precision():
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    right, wrong = torch.tensor([2, 0, 1]), torch.tensor([0, 2, 1])
    assert matryoshka_cosent(queries, targets, right, temperature=1e-3).item() == 0
    worst = matryoshka_cosent(queries, targets, wrong, temperature=1e-3)
    assert worst.item() == pytest.approx(2000)
    (gradient,) = torch.autograd.grad(worst, queries)
    assert gradient.isfinite().all()
    assert not gradient[2].any()
    *pairs, scores = draw(30, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        half = matryoshka_cosent(*pairs, scores)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(plain_cosent(*(p.double() for p in pairs), scores).item(), rel=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_batch():
    """The differences of 200,000 pairs would be 320 GB."""
    *pairs, scores = draw(200_000, 4, dtype=torch.float32)
    loss = matryoshka_cosent(*pairs, scores)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in pairs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": torch.ones(3)}, r"scores have shape \[3\]; expected one number for each pair: \[4\]"),
        ({"scores": [1, 2, 3, 4]}, "scores have shape list"),
        ({"scores": torch.tensor([1, 2, torch.nan, 4])}, "not all finite"),
        ({"targets": torch.ones(3, 6)}, "give both the same"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"dims": (7,)}, "whole numbers from 1 to D = 6"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 dims"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        matryoshka_cosent(
            **{"queries": torch.ones(4, 6), "targets": torch.ones(4, 6), "scores": torch.ones(4), **changed}
        )
