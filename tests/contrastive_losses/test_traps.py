"""float32 where contrastive losses lose their digits: nearly solved, collapsed and antipodal batches, tiny prefixes."""

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_losses import matryoshka_info_nce
from contrastive_losses.plain import plain_info_nce

ROWS, WIDTH, DIMS = 300, 64, (16, 64)


def traps(seed):
    ones = torch.ones(ROWS, WIDTH)
    noise, other = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    lean = torch.cat([-ones[:, :32], math.sqrt(3) * ones[:, 32:]], dim=1)  # cosine 0.26 with ones, -1 in 16
    return {
        "random": (noise, other),
        "nearly solved": (noise, noise + 0.3 * other),
        "solved": (noise, noise),
        "solved but for noise": (noise, noise + 0.01 * other),
        "all nearly equal": (ones + 1e-3 * noise, ones + 1e-3 * other),
        "all pairs antipodal": (noise, -noise),
        "two antipodal cones": (ones + 1e-2 * noise, -ones + 1e-2 * other),
        "two cones apart": (ones + 0.1 * noise, lean + 0.1 * other),
        "one antipodal row": (torch.cat([-ones[:1], ones[1:]]) + 0.05 * noise, ones + 0.05 * other),
        "duplicates": (noise[torch.arange(ROWS) % 7], other[torch.arange(ROWS) % 5]),
    }


TRAPS = traps(0)
NOISE, OTHER = TRAPS["random"]
SOLVED = ("nearly solved", "solved", "solved but for noise")
SEEDS = 12


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
def test_float32_is_never_worse_than_cross_entropy(name, scale):
    """Loss and gradients: the largest error, as a share of the largest true number, in the mean over draws of a batch.
    Single numbers (loss, temperature) that are right to 2 eps are at the rounding of float32, where either may chance
    on less; so much alone is granted."""
    errors = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(SEEDS):
        rows, temperature = traps(seed)[name], torch.tensor(1 / scale)
        exact = loss_and_gradients(plain_info_nce, rows, temperature, torch.float64)
        for k, loss in enumerate((matryoshka_info_nce, cross_entropies)):
            given = loss_and_gradients(loss, rows, temperature, torch.float32)
            errors[k] += torch.stack(
                [(value - true).abs().max() / true.abs().max() for value, true in zip(given, exact, strict=True)]
            )
    ours, theirs = errors / SEEDS
    floor = 2 * torch.finfo(torch.float32).eps
    allowed = theirs.maximum(torch.tensor([floor, 0, 0, floor]))
    assert (ours <= allowed).all(), f"{ours.tolist()}, cross entropy {theirs.tolist()}"


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
