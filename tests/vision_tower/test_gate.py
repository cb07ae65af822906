"""SwiGLU's gate and norm in C against PyTorch's own operations in float64, and as a citizen of PyTorch."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from vision_tower import gate
from vision_tower.gate import GatedNorm

pytestmark = pytest.mark.skipif(
    gate.LIBRARY is None and not shutil.which("cc"), reason="no C compiler, so nothing was built"
)


def test_it_is_built_where_there_is_a_compiler():
    assert gate.LIBRARY is not None, "pip install -e packages/vision-tower builds it"


def norm_of(hidden: int) -> GatedNorm:
    norm = GatedNorm(hidden, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def results(norm, gate, value, grad):
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, norm.weight, norm.bias], grad)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 8), (5, 1, 9), (300, 16), (2, 197, 2730), (130, 2048)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_output_and_gradients_equal_pytorchs_in_float64(shape, scale):
    """Rows that are no multiple of a vector, more rows than a block has; inputs for which exp overflows float32."""
    torch.manual_seed(0)
    gate, value, grad = scale * torch.randn(shape), torch.randn(shape) + 1, torch.randn(shape)
    norm = norm_of(shape[-1])
    ours = results(norm, gate, value, grad)
    exact = results(norm_in_float64(norm), gate.double(), value.double(), grad.double())
    for name, found, expected in zip(("out", "gate", "value", "weight", "bias"), ours, exact, strict=True):
        assert found.dtype == torch.float32
        if shape[-1] > 1:  # a row of one is nothing but rounding, divided by sqrt(eps)
            assert (found - expected).norm() <= 2e-6 * expected.norm(), name


def norm_in_float64(norm):
    wide = GatedNorm(norm.weight.numel(), eps=norm.eps).double()
    wide.load_state_dict(norm.state_dict())
    return wide


def test_what_is_not_finite_stays_so():
    """A step's overflow has to show in its gradients, or nobody would skip the step."""
    for bad in (float("nan"), float("inf")):
        for place in range(3):
            tensors = [torch.randn(2, 24) for _ in range(3)]
            tensors[place][0, 3] = bad
            out, *gradients = results(norm_of(24), *tensors)
            assert not gradients[0][0].isfinite().all()
            assert (place == 2) == out[0].isfinite().all()
            assert out[1].isfinite().all()


def test_strides_make_no_difference():
    gate, value, grad = (torch.randn(6, 4, 40) for _ in range(3))
    norm = norm_of(40)
    expected = results(norm, gate, value, grad)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (gate, value, grad)]
    sliced = [torch.cat([t, t], dim=-1)[..., :40] for t in (gate, value, grad)]
    for others in (strided, sliced):
        assert not others[0].is_contiguous()
        assert all(map(torch.equal, results(norm, *others), expected))


def test_other_shapes_are_pytorchs_matter():
    norm, gate, value = norm_of(24), torch.randn(3, 24), torch.randn(1, 24)
    torch.testing.assert_close(norm(gate, value), norm(gate, value.expand(3, -1)))
    with pytest.raises(RuntimeError, match="size"):
        norm(gate, torch.randn(3, 25))
    with pytest.raises(RuntimeError, match="shape"):
        norm(torch.randn(3, 25), torch.randn(3, 25))


def test_no_rows_and_no_gradients():
    norm = norm_of(16)
    out, of_gate, _, of_weight, _ = results(norm, *(torch.randn(0, 16) for _ in range(3)))
    assert out.shape == of_gate.shape == (0, 16)
    assert of_weight.eq(0).all()
    norm.requires_grad_(False)
    assert not norm(torch.randn(2, 16), torch.randn(2, 16)).requires_grad


def test_the_same_bits_with_any_number_of_threads_and_after_a_fork():
    script = """
import os, sys, torch
from vision_tower.gate import GatedNorm
torch.manual_seed(0)
norm, tensors = GatedNorm(8), [torch.randn(1000, 8) for _ in range(3)]  # PyTorch itself uses one thread for so few
def results():
    leaves = [t.clone().requires_grad_() for t in tensors[:2]]
    out = norm(*leaves)
    return [out, *torch.autograd.grad(out, [*leaves, norm.weight, norm.bias], tensors[2])]
torch.set_num_threads(1)
expected = results()
for threads in (2, 3, 16):
    torch.set_num_threads(threads)
    assert all(map(torch.equal, results(), expected)), threads
child = os.fork()
if child == 0:
    os._exit(0 if all(map(torch.equal, results(), expected)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_fake_tensors_agree_with_the_real_thing():
    arguments = [torch.randn(3, 5, 24), torch.randn(3, 5, 24), torch.randn(24), torch.randn(24)]
    torch.library.opcheck(gate._gated_norm, (*arguments, 1e-6), test_utils=("test_schema", "test_faketensor"))
    saved = gate._gated_norm(*arguments, 1e-6)[1:]
    arguments = [arguments[0], *arguments[:3], *saved]
    torch.library.opcheck(gate._gated_norm_backward, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_gradients_of_each_sample():
    """`torch.func`, as those use it who want each sample's gradient."""
    norm, gate, value = norm_of(24), torch.randn(4, 5, 24), torch.randn(4, 5, 24)

    def loss(weight, gate, value):
        return torch.func.functional_call(norm, {"weight": weight}, (gate, value)).pow(3).sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(norm.weight.detach(), gate, value)
    each = [torch.func.grad(loss)(norm.weight.detach(), *pair) for pair in zip(gate, value, strict=True)]
    torch.testing.assert_close(ours, torch.stack(each))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_take_pytorchs_operations(dtype):
    norm, gate, value = norm_of(24).to(dtype), torch.randn(3, 24, dtype=dtype), torch.randn(3, 24, dtype=dtype)
    expected = F.layer_norm(F.silu(gate) * value, (24,), norm.weight, norm.bias, 1e-6)
    assert norm(gate, value).dtype == dtype
    torch.testing.assert_close(norm(gate, value), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-2)
