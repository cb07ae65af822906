"""SwiGLU's gate, whose backward pass computes silu again, against PyTorch's own operations."""

import pytest
import torch
import torch.nn.functional as F
from vision_tower.blocks import Gate


def results(function, gate, value, grad):
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_the_plain_expressions(dtype, scale):
    torch.manual_seed(0)
    gate, value, grad = (torch.randn(3, 5, 24, dtype=dtype) * s for s in (scale, 1, 1))
    ours = results(Gate.apply, gate, value, grad)
    for found, expected in zip(ours, results(lambda g, v: F.silu(g) * v, gate, value, grad), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_what_is_not_finite_stays_so():
    """A step's overflow has to show in its gradients, or nobody would skip the step."""
    for bad in (float("nan"), float("inf")):
        for place in range(3):
            tensors = [torch.randn(2, 24) for _ in range(3)]
            tensors[place][0, 3] = bad
            out, *gradients = results(Gate.apply, *tensors)
            assert not all(g[0].isfinite().all() for g in gradients)
            assert (place == 2) == out[0].isfinite().all()
            assert out[1].isfinite().all()


def test_only_the_inputs_are_kept_for_the_backward_pass():
    kept = []
    gate, value = (torch.randn(3, 24, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        Gate.apply(gate, value)
    assert sorted(kept) == sorted((gate.data_ptr(), value.data_ptr()))


def test_gradients_of_each_sample():
    """`torch.func`, as those use it who want each sample's gradient."""
    gate, value = torch.randn(4, 5, 24), torch.randn(4, 5, 24)
    gradients = torch.func.grad(lambda g, v: Gate.apply(g, v).pow(3).sum(), argnums=(0, 1))
    ours = torch.func.vmap(gradients)(gate, value)
    each = [gradients(*pair) for pair in zip(gate, value, strict=True)]
    for place in range(2):
        torch.testing.assert_close(ours[place], torch.stack([one[place] for one in each]))


def test_a_second_derivative_is_refused():
    """It would be wrong without a word: the backward pass is computed in place."""
    gate = torch.randn(3, 24, requires_grad=True)
    (first,) = torch.autograd.grad(Gate.apply(gate, torch.ones(3, 24)).pow(2).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(first.sum(), gate)
