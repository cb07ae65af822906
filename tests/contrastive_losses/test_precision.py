"""Products of float32 embeddings in a lower precision, where a loss is told so."""

import pytest
import torch
import torch.nn.functional as F
from contrastive_losses import InfoNCE, SigmoidLoss, fused, matryoshka_info_nce, matryoshka_sigmoid
from contrastive_losses.plain import plain_info_nce
from contrastive_losses.precision import products_in

DIMS = (64, 256)


def pairs(close, rows=128, seed=0):
    """Queries, targets and two hard negatives each, float32; `close` is how alike a pair is."""
    generator = torch.Generator().manual_seed(seed)
    queries, noise, hard, more = (torch.randn(rows, 256, generator=generator) for _ in range(4))
    targets = close * queries + (1 - close) * noise
    negatives = torch.stack([0.5 * targets + hard, more], dim=1)
    return [3 * each for each in (queries, targets, negatives)]


def loss_and_gradients(function, columns, **options):
    leaves = [each.detach().requires_grad_() for each in columns]
    loss = function(leaves[0], leaves[1], negatives=leaves[2], dims=DIMS, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def by_autocast(queries, targets, *, negatives, dims, temperature):
    """As open_clip computes it under torch.autocast: logits are products in bfloat16."""
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        for dim in dims:
            q, t, n = (F.normalize(x[..., :dim], dim=-1) for x in (queries, targets, negatives.flatten(0, 1)))
            to_targets, to_hard = q @ t.T / temperature, q @ n.T / temperature
            answer = torch.arange(len(q))
            total = total + F.cross_entropy(torch.cat([to_targets, to_hard], 1).float(), answer)
            total = total + F.cross_entropy(to_targets.T.float(), answer)
    return total


@pytest.mark.parametrize("function", [matryoshka_info_nce, matryoshka_sigmoid])
def test_bf16_is_what_rounded_embeddings_give_with_gradients_in_float32(function):
    columns, options = pairs(0.5), {"temperature": 0.05}
    if function is matryoshka_sigmoid:
        options["bias"] = -5.0
    loss, gradients = loss_and_gradients(function, columns, precision="bf16", **options)
    wide = [each.bfloat16().float() for each in columns]
    expected, exact = loss_and_gradients(function, wide, **options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scale", [20, 100])
@pytest.mark.parametrize("close", [0.2, 0.5, 0.9])
def test_the_error_is_below_that_of_logits_under_autocast(close, scale):
    """Loss and gradients against float64, in the mean over draws."""
    ours, theirs = [], []
    for seed in range(5):
        columns = pairs(close, seed=seed)
        exact = loss_and_gradients(plain_info_nce, [each.double() for each in columns], temperature=1 / scale)
        for errors, function, options in (
            (ours, matryoshka_info_nce, {"precision": "bf16"}),
            (theirs, by_autocast, {}),
        ):
            loss, gradients = loss_and_gradients(function, columns, temperature=1 / scale, **options)
            off = sum((a.double() - b).square().sum() for a, b in zip(gradients, exact[1], strict=True))
            relative = (off / sum(b.square().sum() for b in exact[1])).sqrt()
            errors.append(torch.stack([(loss.double() - exact[0]).abs() / exact[0].clamp_min(1e-3), relative]))
    ours, theirs = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
    assert ours[1] < 0.7 * theirs[1], (ours, theirs)
    assert (ours < torch.tensor([1e-4, 1e-3]) * scale).all(), ours  # a logit's error is a cosine's times the scale


def test_cosines_have_the_error_that_the_documentation_states():
    generator = torch.Generator().manual_seed(0)
    for width in (64, 1024):
        rows = F.normalize(torch.randn(2, 4000, width, generator=generator), dim=-1)
        off = (rows[0] * rows[1]).sum(-1) - (rows[0].bfloat16().float() * rows[1].bfloat16().float()).sum(-1)
        assert 0.8 < off.std() / (2**-9 / width**0.5) < 1.4


def test_on_a_cpu_all_others_are_float32():
    columns = pairs(0.5)
    exact = loss_and_gradients(matryoshka_info_nce, columns, temperature=0.05)
    for precision in (None, "ieee", "tf32"):
        found = loss_and_gradients(matryoshka_info_nce, columns, temperature=0.05, precision=precision)
        assert torch.equal(found[0], exact[0])
        assert all(map(torch.equal, found[1], exact[1]))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_both_passes_run_under_the_precision_and_leave_the_process_as_it_was(monkeypatch, precision):
    """`products_in` alone decides: Triton's kernels and PyTorch's products both read PyTorch's setting."""
    matmul, seen, asked = torch.backends.cuda.matmul, [], []
    before = matmul.fp32_precision

    def on_a_gpu(wanted, device):
        asked.append((wanted, device.type))
        return products_in(wanted, torch.device("cuda"))

    real = fused.tiles_for

    def tiles_for(strip):
        seen.append(matmul.fp32_precision)
        return real(strip)

    monkeypatch.setattr(fused, "products_in", on_a_gpu)
    monkeypatch.setattr(fused, "tiles_for", tiles_for)
    loss_and_gradients(matryoshka_info_nce, pairs(0.5), temperature=0.05, precision=precision)
    assert seen == [precision, precision]
    assert asked == [(precision, "cpu")] * 2
    assert matmul.fp32_precision == before
    with pytest.raises(ValueError, match="in between"), products_in(precision, torch.device("cuda")):
        raise ValueError("in between")
    assert matmul.fp32_precision == before


def test_a_precision_that_does_not_fit_is_refused():
    rows = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"precision is 'fp8'; expected one of ieee, tf32, bf16, or None"):
        matryoshka_info_nce(rows, rows, temperature=0.1, precision="fp8")
    with pytest.raises(ValueError, match=r"precision is 'bf16' and there are float64 embeddings"):
        matryoshka_info_nce(rows, rows.double(), temperature=0.1, precision="bf16")
    with pytest.raises(ValueError, match=r"precision is 'half'"):
        InfoNCE(precision="half")


@pytest.mark.parametrize("cls", [InfoNCE, SigmoidLoss])
def test_a_module_hands_its_precision_on(cls):
    queries, targets, _ = pairs(0.5)
    module, exact = cls(precision="bf16"), cls()
    found = module(queries, targets)
    assert torch.equal(found, exact(queries.bfloat16(), targets.bfloat16()))
    assert not torch.equal(found, exact(queries, targets))
    assert "precision=bf16" in repr(module)
