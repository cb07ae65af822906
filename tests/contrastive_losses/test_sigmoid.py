"""SigLIP's loss: by hand, and its module."""

import math

import pytest
import torch
from contrastive_losses import InfoNCE, SigmoidLoss, matryoshka_sigmoid


def s(x):
    return math.log1p(math.exp(x))


def test_pairs_counted_by_hand():
    """Cosines 1 on the diagonal, 0 elsewhere but for one hard negative that equals query 0; scale 2, bias -0.5."""
    rows = torch.eye(3, dtype=torch.float64)
    loss = matryoshka_sigmoid(rows, rows, temperature=0.5, bias=-0.5)
    assert loss.item() == pytest.approx(s(-1.5) + 2 * s(-0.5), rel=1e-12)
    negatives = torch.zeros(3, 1, 3, dtype=torch.float64)
    negatives[2, 0, 0] = 7.0
    loss = matryoshka_sigmoid(rows, rows, temperature=0.5, bias=-0.5, negatives=negatives)
    hard = (s(1.5) + 8 * s(-0.5)) / 3
    assert loss.item() == pytest.approx(s(-1.5) + 2 * s(-0.5) + hard, rel=1e-12)
    ids = torch.tensor([4, 5, 4])
    loss = matryoshka_sigmoid(rows, rows, temperature=0.5, bias=-0.5, target_ids=ids)
    assert loss.item() == pytest.approx(s(-1.5) + 4 / 3 * s(-0.5), rel=1e-12)


def test_module_starts_where_siglip_starts_and_learns_both_scalars(make_batch):
    module = SigmoidLoss(dims=(4, 8))
    assert {name: value.shape for name, value in module.named_parameters()} == {"log_scale": (1,), "bias": (1,)}
    assert module.temperature.item() == pytest.approx(0.1)
    assert module.bias.item() == -10
    queries, targets, negatives = make_batch(4, hard=2)
    loss, stats = module(queries, targets, negatives, query_ids=torch.arange(4), return_stats=True)
    expected = matryoshka_sigmoid(
        queries, targets, negatives=negatives, temperature=module.temperature, bias=-10.0, dims=(4, 8)
    )
    assert torch.equal(loss, expected)
    loss.backward()
    assert module.bias.grad.item() < 0  # few pairs are positive, yet at -10 all are far on the negative side
    assert module.log_scale.grad is not None
    assert stats.dims == (4, 8)


def test_statistics_are_those_of_the_same_cosines(make_batch):
    queries, targets, negatives = make_batch(6, hard=2)
    _, ours = SigmoidLoss(dims=(4, 8))(queries, targets, negatives, return_stats=True)
    _, theirs = InfoNCE(dims=(4, 8))(queries, targets, negatives, return_stats=True)
    for left, right in zip(vars(ours).values(), vars(theirs).values(), strict=True):
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_scalars_stay_float32_and_clamp_holds_the_temperature():
    module = SigmoidLoss(temperature=0.01).bfloat16()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    with torch.no_grad():
        module.log_scale += 1
    module.clamp_()
    assert module.temperature.item() == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize(("bias", "message"), [(float("nan"), "bias is nan"), (torch.ones(2), r"bias has shape \[2\]")])
def test_a_bias_that_does_not_fit_is_refused(bias, message):
    with pytest.raises(ValueError, match=message):
        matryoshka_sigmoid(torch.ones(2, 2), torch.ones(2, 2), temperature=1.0, bias=bias)
    if isinstance(bias, float):
        with pytest.raises(ValueError, match=message):
            SigmoidLoss(bias=bias)
