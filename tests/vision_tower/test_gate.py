"""SwiGLU's gate and norm in C against PyTorch's own operations in float64, and as a citizen of PyTorch."""

import ctypes
import shutil
import subprocess
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from vision_tower import gate
from vision_tower.gate import GatedNorm

COMPILER = shutil.which("cc")
needs_library = pytest.mark.skipif(gate.LIBRARY is None, reason="no C compiler")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """gate.c as it is for processors without AVX2."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    built, source = tmp_path_factory.mktemp("narrow") / "gate.so", Path(gate.__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-O2", "-DNARROW", "-w", "-shared", "-fPIC", "-o", built, source, "-lm"], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture(params=["built", "narrow", "PyTorch"])
def any_library(request, monkeypatch):
    """Each of the three ways to the same numbers."""
    if request.param == "narrow":
        monkeypatch.setattr(gate, "LIBRARY", request.getfixturevalue("narrow"))
    elif request.param == "PyTorch":
        monkeypatch.setattr(gate, "LIBRARY", None)
    elif gate.LIBRARY is None:
        pytest.skip("no C compiler")


def test_it_is_built_where_there_is_a_compiler():
    assert COMPILER is None or gate.LIBRARY is not None, "pip install -e packages/vision-tower builds it"


@pytest.mark.parametrize("kind", ["damaged", "of another version"])
def test_a_library_of_no_use_is_named_and_left(kind, monkeypatch, tmp_path):
    built = tmp_path / "_gate.so"
    if kind == "damaged":
        built.write_bytes(b"not a library")
    elif COMPILER is None:
        pytest.skip("no C compiler")
    else:
        (tmp_path / "old.c").write_text("void gated_norm_0(void) {}")
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", built, tmp_path / "old.c"], check=True)
    monkeypatch.setattr(gate, "find_spec", lambda _: ModuleSpec("vision_tower._gate", None, origin=str(built)))
    with pytest.warns(UserWarning, match=r"_gate\.so is of no use .* install vision-tower again"):
        assert gate._load() is None


def norm_of(hidden: int) -> GatedNorm:
    norm = GatedNorm(hidden, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def results(norm, gate, value, grad):
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, norm.weight, norm.bias], grad)]


@pytest.mark.parametrize("shape", [(9, 7), (3, 8), (5, 1, 9), (300, 16), (2, 197, 2730), (130, 2048)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.usefixtures("any_library")
def test_output_and_gradients_equal_pytorchs_in_float64(shape, scale):
    """Rows that are no multiple of a vector, more rows than a block has; inputs for which exp overflows float32."""
    torch.manual_seed(0)
    gate, value, grad = scale * torch.randn(shape), torch.randn(shape) + 1, torch.randn(shape)
    norm = norm_of(shape[-1])
    ours = results(norm, gate, value, grad)
    exact = results(norm_in_float64(norm), gate.double(), value.double(), grad.double())
    for name, found, expected in zip(("out", "gate", "value", "weight", "bias"), ours, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 2e-6 * expected.norm(), name


def norm_in_float64(norm):
    wide = GatedNorm(norm.weight.numel(), eps=norm.eps).double()
    wide.load_state_dict(norm.state_dict())
    return wide


@pytest.mark.usefixtures("any_library")
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
    out, *_ = results(norm_of(24), torch.full((1, 24), 1e15), torch.arange(24.0)[None] * 1e15, torch.randn(1, 24))
    assert not out.isfinite().all()  # the squares overflow


@pytest.mark.usefixtures("any_library")
def test_strides_make_no_difference():
    gate, value, grad = (torch.randn(6, 4, 40) for _ in range(3))
    norm = norm_of(40)
    expected = results(norm, gate, value, grad)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (gate, value, grad)]
    sliced = [torch.cat([t, t], dim=-1)[..., :40] for t in (gate, value, grad)]
    for name in ("weight", "bias"):
        wide = torch.stack([getattr(norm, name).detach()] * 2, dim=1)
        setattr(norm, name, torch.nn.Parameter(wide[:, 0]))
    for others in (strided, sliced):
        assert not others[0].is_contiguous()
        torch.testing.assert_close(results(norm, *others), expected)


@needs_library
def test_other_shapes_are_pytorchs_matter():
    norm, gate, value = norm_of(24), torch.randn(3, 24), torch.randn(1, 24)
    torch.testing.assert_close(norm(gate, value), norm(gate, value.expand(3, -1)))
    with pytest.raises(RuntimeError, match="size"):
        norm(gate, torch.randn(3, 25))
    with pytest.raises(RuntimeError, match="shape"):
        norm(torch.randn(3, 25), torch.randn(3, 25))
    with pytest.raises(RuntimeError, match="shape"):
        torch.func.functional_call(norm, {"bias": torch.zeros(1)}, (gate, gate))
    out = norm(gate, gate)
    norm.weight.data = torch.empty(0)  # as ZeRO-3 leaves what it has not gathered
    with pytest.raises(ValueError, match="weight is"):
        out.sum().backward()


def test_no_rows_and_no_gradients():
    norm = norm_of(16)
    out, of_gate, _, of_weight, _ = results(norm, *(torch.randn(0, 16) for _ in range(3)))
    assert out.shape == of_gate.shape == (0, 16)
    assert of_weight.eq(0).all()
    norm.requires_grad_(False)
    assert not norm(torch.randn(2, 16), torch.randn(2, 16)).requires_grad


@needs_library
def test_the_same_bits_with_any_number_of_threads():
    threads, norm = torch.get_num_threads(), norm_of(2048)
    tensors = [torch.randn(2100, 2048) for _ in range(3)]
    try:
        torch.set_num_threads(1)
        expected = results(norm, *tensors)
        for number in (2, 3, 16):  # at most four are used
            torch.set_num_threads(number)
            assert all(map(torch.equal, results(norm, *tensors)[:3], expected))
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_fake_tensors_agree_with_the_real_thing():
    arguments = [torch.randn(3, 5, 24), torch.randn(3, 5, 24), torch.randn(24), torch.randn(24)]
    torch.library.opcheck(gate._gated_norm, (*arguments, 1e-6), test_utils=("test_schema", "test_faketensor"))
    saved = gate._gated_norm(*arguments, 1e-6)[1:]
    arguments = [arguments[0], *arguments[:3], *saved]
    torch.library.opcheck(gate._gated_norm_backward, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("any_library")
def test_gradients_of_each_sample():
    """`torch.func`, as those use it who want each sample's gradient."""
    norm, gate, value = norm_of(24), torch.randn(4, 5, 24), torch.randn(4, 5, 24)

    def loss(weights, gate, value):
        return torch.func.functional_call(norm, weights, (gate, value)).pow(3).sum()

    weights = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    ours = torch.func.vmap(gradients, in_dims=(None, 0, 0))(weights, gate, value)
    each = [gradients(weights, *pair) for pair in zip(gate, value, strict=True)]
    torch.testing.assert_close(ours[0]["weight"], torch.stack([one[0]["weight"] for one in each]))
    torch.testing.assert_close(ours[1], torch.stack([one[1] for one in each]))
    torch.testing.assert_close(ours[2], torch.stack([one[2] for one in each]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_take_pytorchs_operations(dtype):
    norm, gate, value = norm_of(24).to(dtype), torch.randn(3, 24, dtype=dtype), torch.randn(3, 24, dtype=dtype)
    expected = F.layer_norm(F.silu(gate) * value, (24,), norm.weight, norm.bias, 1e-6)
    assert norm(gate, value).dtype == dtype
    torch.testing.assert_close(norm(gate, value), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-12, atol=1e-2)
