"""float32 where contrastive losses lose their digits: nearly solved, collapsed and antipodal batches, tiny prefixes."""

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_losses import matryoshka_info_nce
from contrastive_losses.plain import plain_info_nce

ROWS, WIDTH, DIMS = 300, 64, (16, 64)
GENERATOR = torch.Generator().manual_seed(0)
ONES, NOISE, OTHER = torch.ones(ROWS, WIDTH), *torch.randn(2, ROWS, WIDTH, generator=GENERATOR)
LEAN = torch.cat([-ONES[:, :32], math.sqrt(3) * ONES[:, 32:]], dim=1)  # in every prefix of 64: cosine 0.37 with ONES
SOLVED = ("nearly solved", "solved", "solved but for noise")
TRAPS = {
    "random": (NOISE, OTHER),
    "nearly solved": (NOISE, NOISE + 0.3 * OTHER),
    "solved": (NOISE, NOISE),
    "solved but for noise": (NOISE, NOISE + 0.01 * OTHER),
    "all nearly equal": (ONES + 1e-3 * NOISE, ONES + 1e-3 * OTHER),
    "all pairs antipodal": (NOISE, -NOISE),
    "two antipodal cones": (ONES + 1e-2 * NOISE, -ONES + 1e-2 * OTHER),
    "two cones apart": (ONES + 0.1 * NOISE, LEAN + 0.1 * OTHER),
    "one antipodal row": (torch.cat([-ONES[:1], ONES[1:]]) + 0.05 * NOISE, ONES + 0.05 * OTHER),
    "duplicates": (NOISE[torch.arange(ROWS) % 7], OTHER[torch.arange(ROWS) % 5]),
}


def cross_entropies(queries, targets, temperature, dims):
    total, answer = 0.0, torch.arange(len(queries))
    for dim in dims:
        logits = F.normalize(queries[:, :dim], dim=1) @ F.normalize(targets[:, :dim], dim=1).T / temperature
        total = total + F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)
    return total


def loss_and_gradients(loss, rows, temperature, dtype):
    inputs = [value.to(dtype, copy=True).requires_grad_() for value in (*rows, temperature)]
    result = loss(inputs[0], inputs[1], temperature=inputs[2], dims=DIMS)
    return [value.double() for value in (result.detach(), *torch.autograd.grad(result, inputs))]


@pytest.mark.parametrize("scale", [1, 20, 100])
@pytest.mark.parametrize("name", TRAPS)
def test_float32_is_as_good_as_cross_entropy_within_rounding(name, scale):
    """Errors against float64, as shares of the true size. A logit in float32 has a rounding error of scale * 6e-8, for
    which positives and negatives have different signs here and the same in a cross entropy: so much is granted, or half
    as much again as the cross entropy's error. Collapsed batches need that: there its own cancellation is luckier."""
    temperature = torch.tensor(1 / scale)
    exact = loss_and_gradients(plain_info_nce, TRAPS[name], temperature, torch.float64)
    ours = loss_and_gradients(matryoshka_info_nce, TRAPS[name], temperature, torch.float32)
    theirs = loss_and_gradients(cross_entropies, TRAPS[name], temperature, torch.float32)
    granted = scale * torch.finfo(torch.float32).eps
    # The derivative by the temperature is a sum of parts that may cancel; rounding follows the size of the parts.
    sizes = [value.abs().max() for value in exact[:3]] + [max(exact[3].abs(), scale * exact[0].abs())]
    for true, our, their, size in zip(exact, ours, theirs, sizes, strict=True):
        assert (our - true).abs().max() <= max(1.5 * (their - true).abs().max(), granted * size)


@pytest.mark.parametrize("name", SOLVED)
def test_a_solved_batch_keeps_digits_that_cross_entropy_loses(name):
    temperature = torch.tensor(0.01)
    exact = loss_and_gradients(plain_info_nce, TRAPS[name], temperature, torch.float64)
    ours = loss_and_gradients(matryoshka_info_nce, TRAPS[name], temperature, torch.float32)
    theirs = loss_and_gradients(cross_entropies, TRAPS[name], temperature, torch.float32)
    for k in (0, 3):  # loss and temperature
        assert abs(ours[k] / exact[k] - 1) < 2e-5
        assert abs(theirs[k] / exact[k] - 1) > 10 * abs(ours[k] / exact[k] - 1)


def test_a_loss_of_1e_7_has_six_digits_in_float32():
    """Eight orthogonal pairs at scale 18.2: the true loss is 2 * log1p(7 * exp(-scale)), near 2e-7."""
    scale = 18.2
    rows = torch.eye(8)
    expected = 2 * math.log1p(7 * math.exp(-scale))
    assert 1e-7 < expected < 2e-7
    assert matryoshka_info_nce(rows, rows, temperature=1 / scale).item() == pytest.approx(expected, rel=1e-6)
    assert abs(cross_entropies(rows, rows, 1 / scale, (8,)).item() / expected - 1) > 1e-2


def test_one_shift_at_the_largest_logit_would_lose_what_is_left_of_a_solved_batch():
    """Why sums are not of exp(logit - scale): at scale 100 orthogonal negatives fall below float32 there. This form has
    to fail where ours holds."""
    rows = torch.eye(8)
    cosine = rows @ rows.T
    shifted = torch.exp(100 * cosine - 100).fill_diagonal_(0.0)
    ratio = shifted.sum(1) / torch.exp(100 * cosine.diagonal() - 100)
    expected = 2 * math.log1p(7 * math.exp(-95))  # scale 95 still is above the smallest float32, after its log
    ours = matryoshka_info_nce(rows.double(), rows.double(), temperature=1 / 95).item()
    assert ours == pytest.approx(expected, rel=1e-9)
    single = matryoshka_info_nce(rows, rows, temperature=1 / 80).item()
    assert single == pytest.approx(2 * math.log1p(7 * math.exp(-80)), rel=2e-5)
    assert abs(ratio.mean().item() * 2 / (14 * math.exp(-100)) - 1) > 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e-11, 1e-6, 1e6, 1e15])
def test_the_length_of_a_float32_prefix_does_not_matter_down_to_the_zero_vector(size):
    queries, targets = NOISE[:20].clone(), OTHER[:20].clone()
    plain = matryoshka_info_nce(queries, targets, temperature=0.05, dims=DIMS)
    queries[3] *= size
    targets[3] *= size
    queries.requires_grad_()
    targets.requires_grad_()
    loss = matryoshka_info_nce(queries, targets, temperature=0.05, dims=DIMS)
    loss.backward()
    assert queries.grad.isfinite().all()
    assert targets.grad.isfinite().all()
    if size < 1e-12:
        assert queries.grad[3].count_nonzero() == 0
    else:
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_get_the_gradient_of_float32_rounded_once(dtype, autocast):
    rows = [value.to(dtype) for value in (NOISE, OTHER)]
    inputs = [value.requires_grad_() for value in rows]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = matryoshka_info_nce(*inputs, temperature=0.02, dims=DIMS)
        loss.backward()
    in_float32 = [value.detach().float().requires_grad_() for value in rows]
    expected = matryoshka_info_nce(*in_float32, temperature=0.02, dims=DIMS)
    expected.backward()
    assert torch.equal(loss, expected)
    for value, reference in zip(inputs, in_float32, strict=True):
        assert value.grad.dtype == dtype
        assert torch.equal(value.grad, reference.grad.to(dtype))
