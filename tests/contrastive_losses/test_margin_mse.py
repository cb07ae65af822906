"""Margin-MSE against plain autograd, against sentence-transformers, and at its edges."""

import pytest
import torch
from contrastive_losses import matryoshka_margin_mse
from contrastive_losses.plain import plain_margin_mse


def draw(rows, width=6, hard=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width), (rows, width), (rows, hard, width)]
    embeddings = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return *embeddings, 4 * torch.randn(rows, 1 + hard, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("hard", [1, 3])
def test_loss_and_gradients_are_those_of_the_plain_form(hard):
    *embeddings, scores = draw(5, hard=hard)
    temperature = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    options = {"temperature": temperature, "dims": (6, 2), "weights": (1.0, 3.0)}
    ours, plain = (loss(*embeddings, scores, **options) for loss in (matryoshka_margin_mse, plain_margin_mse))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    inputs = [*embeddings, temperature]
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_finite_differences(normalize):
    *embeddings, scores = draw(4)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss_of(*inputs):
        *rows, t = inputs
        return matryoshka_margin_mse(*rows, scores, temperature=t, dims=(6, 4), normalize=normalize)

    assert torch.autograd.gradcheck(loss_of, [*embeddings, temperature])


@pytest.mark.parametrize("hard", [1, 3])
@pytest.mark.parametrize("similarity", ["pairwise_dot_score", "pairwise_cos_sim"])
def test_it_is_sentence_transformers_loss(similarity, hard):
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    *embeddings, scores = draw(30, hard=hard)
    peer = losses.MarginMSELoss(torch.nn.Identity(), similarity_fct=getattr(util, similarity))
    queries, targets, negatives = embeddings
    theirs = peer.compute_loss_from_embeddings([queries, targets, *negatives.unbind(1)], scores)
    ours = matryoshka_margin_mse(*embeddings, scores, normalize=similarity == "pairwise_cos_sim")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, embeddings), torch.autograd.grad(theirs, embeddings), rtol=1e-10, atol=1e-13
    )


def test_only_differences_of_a_querys_scores_count():
    *embeddings, scores = draw(8)
    loss = matryoshka_margin_mse(*embeddings, scores)
    moved = matryoshka_margin_mse(*embeddings, scores + torch.arange(8.0)[:, None])
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=0)
    margins = scores[:, :1] - scores[:, 1:]
    of_margins = matryoshka_margin_mse(*embeddings, torch.cat([torch.zeros(8, 1), -margins], 1))
    torch.testing.assert_close(of_margins, loss, rtol=1e-12, atol=0)


def test_zero_rows_and_half_precision():
    *embeddings, scores = draw(8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        half = matryoshka_margin_mse(*embeddings, scores)
    assert half.dtype == torch.float32
    expected = plain_margin_mse(*(rows.double() for rows in embeddings), scores)
    assert half.item() == pytest.approx(expected.item(), rel=1e-5)
    queries, targets, negatives = (torch.zeros_like(rows).requires_grad_() for rows in embeddings)
    nothing = matryoshka_margin_mse(queries, targets, negatives, scores)
    assert not any(g.any() for g in torch.autograd.grad(nothing, [queries, targets, negatives]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": torch.ones(4, 2)}, r"scores have shape \[4, 2\]; expected one of each query .*: \[4, 3\]"),
        ({"scores": [1, 2, 3, 4]}, "scores have shape list"),
        ({"scores": torch.full((4, 3), torch.inf)}, "not all finite"),
        ({"negatives": torch.ones(4, 0, 6)}, "there are no negatives"),
        ({"negatives": None}, "there are no negatives"),
        ({"negatives": torch.ones(4, 6)}, "negatives have shape"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"dims": (7,)}, "whole numbers from 1 to D = 6"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    good = {"queries": torch.ones(4, 6), "targets": torch.ones(4, 6), "negatives": torch.ones(4, 2, 6)}
    with pytest.raises(ValueError, match=message):
        matryoshka_margin_mse(**{**good, "scores": torch.ones(4, 3), **changed})
