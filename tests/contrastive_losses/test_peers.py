"""The numbers of public losses, where those are right: one process, one loss for each of their settings."""

import pytest
import torch
import torch.nn.functional as F
from contrastive_losses import matryoshka_info_nce, matryoshka_sigmoid

DIMS, WEIGHTS = (4, 8, 16), (1.0, 0.5, 2.0)


@pytest.fixture
def columns():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 16, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hard", [0, 2])
def test_half_of_it_is_sentence_transformers_symmetric_matryoshka_loss(columns, hard):
    """Which takes the mean of the two directions, not their sum."""
    from sentence_transformers.sentence_transformer import losses

    class Embedded(torch.nn.Module):
        """A model whose features are embeddings already."""

        def forward(self, features):
            return dict(features)

        def get_embedding_dimension(self):
            return 16

    model = Embedded()
    inner = losses.MultipleNegativesRankingLoss(
        model, scale=20.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    peer = losses.MatryoshkaLoss(model, inner, matryoshka_dims=list(DIMS), matryoshka_weights=list(WEIGHTS))
    given = columns[: 2 + hard]
    theirs = peer([{"sentence_embedding": each} for each in given], None)
    negatives = torch.stack(given[2:], dim=1) if hard else None
    ours = matryoshka_info_nce(*given[:2], negatives=negatives, temperature=0.05, dims=DIMS, weights=WEIGHTS)
    assert_same(ours / 2, theirs, given)


def test_half_of_it_is_open_clips_loss_at_each_dim(columns):
    from open_clip import loss as open_clip

    queries, targets = columns[:2]
    theirs = sum(
        weight * open_clip.ClipLoss()(F.normalize(queries[:, :dim], dim=1), F.normalize(targets[:, :dim], dim=1), 20.0)
        for dim, weight in zip(DIMS, WEIGHTS, strict=True)
    )
    ours = matryoshka_info_nce(queries, targets, temperature=0.05, dims=DIMS, weights=WEIGHTS)
    assert_same(ours / 2, theirs, [queries, targets])


def test_the_sigmoid_loss_is_open_clips_siglip_loss_at_each_dim(columns):
    from open_clip import loss as open_clip

    queries, targets = columns[:2]
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    theirs = sum(
        open_clip.SigLipLoss()(F.normalize(queries[:, :d], dim=1), F.normalize(targets[:, :d], dim=1), scale, bias)
        for d in DIMS
    )
    ours = matryoshka_sigmoid(queries, targets, temperature=1 / scale, bias=bias, dims=DIMS)
    assert_same(ours, theirs, [queries, targets, scale, bias])
