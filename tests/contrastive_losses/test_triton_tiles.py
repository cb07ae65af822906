"""The Triton kernels against the plain loss in float64 and against the plain torch tiles.

They run on the GPU if there is one. Otherwise they run in Triton's interpreter, which has to be chosen before Triton is
imported: `test_triton_compiles` starts this file in a process of its own.
"""

import os
from unittest import mock

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

triton_tiles = pytest.importorskip("contrastive_losses.triton_tiles")

from contrastive_losses import fused, matryoshka_info_nce, torch_tiles, triton_check  # noqa: E402
from contrastive_losses.plain import plain_info_nce  # noqa: E402
from contrastive_losses.strip import Needs, Strip  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # numpy's, for log2(0), which is -inf
    pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning"),  # also, where a nan is to come out
]
# Loss, gradients. In 16 bits the products of the backward pass take H in bfloat16, of 8 bits.
TOLERANCE = {torch.float32: (2e-7, 5e-6), torch.bfloat16: (2e-7, 1e-2), torch.float16: (2e-7, 1e-2)}


@pytest.fixture(autouse=True, scope="module")
def products_of_bfloat16_in_the_interpreter():
    """Triton's interpreter keeps bfloat16 as uint16 and multiplies these numbers as they are; its sum is right."""
    if ON_GPU:
        yield
        return
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    original = InterpreterBuilder.create_dot
    with mock.patch.object(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest)
    ):
        yield


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def by(tiles):
    """The loss, forward and backward, by these tiles."""

    def loss_and_its_gradients(*args, **options):
        with mock.patch.object(fused, "tiles_for", return_value=tiles):
            return loss_and_gradients(matryoshka_info_nce, *args, **options)

    return loss_and_its_gradients


def loss_and_gradients(function, embeddings, scale, upstream=1.0, dtype=None, **options):
    """The loss and the gradients of queries, targets, temperature and, if there are any, negatives."""
    queries, targets, *negatives = (each.detach().to(dtype).requires_grad_() for each in embeddings)
    temperature = torch.tensor(1 / scale, dtype=torch.float64, device=DEVICE, requires_grad=True)
    if negatives:
        options["negatives"] = negatives[0]
    loss = function(queries, targets, temperature=temperature, **options)
    return loss.detach(), torch.autograd.grad(upstream * loss, [queries, targets, temperature, *negatives])


ROWS = 150  # two tiles, of which the second is not full
IDS = {"query_ids": torch.arange(ROWS, device=DEVICE) // 2, "target_ids": torch.arange(ROWS, device=DEVICE) % 140}
WEIGHTS = {"sample_weights": torch.arange(ROWS, device=DEVICE) % 7 / 7}
CASES = {
    "one prefix": ({}, 64, 0),
    "prefixes of whole chunks": ({"dims": (128, 64), "weights": (0.5, 2.0)}, 128, 0),
    "prefixes between chunks, short of D": ({"dims": (5, 70, 96)}, 100, 0),
    "hard negatives": ({"dims": (32, 64)}, 64, 1),
    "ids and weights": ({"dims": (32, 64), **IDS, **WEIGHTS}, 64, 0),
    "margin": ({"dims": (32, 64), "false_negative_margin": 0.1}, 64, 1),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, dtype) for name in ("hard negatives", "ids and weights") for dtype in (torch.bfloat16, torch.float16)],
)
def test_loss_and_gradients_are_those_of_the_plain_loss(name, dtype):
    options, width, hard = CASES[name]
    shapes = [(ROWS, width), (ROWS, width)] + [(ROWS, hard, width)] * bool(hard)
    embeddings = [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    ours = by(triton_tiles)(embeddings, 20.0, upstream=0.7, dtype=dtype, **options)
    exact = loss_and_gradients(plain_info_nce, embeddings, 20.0, upstream=0.7, dtype=torch.float64, **options)
    of_loss, of_gradients = TOLERANCE[dtype]
    assert ours[0].dtype == torch.float32
    assert error(ours[0], exact[0]) < of_loss
    for gradient, wanted in zip(ours[1], exact[1], strict=True):
        assert error(gradient, wanted) < of_gradients


def test_float32_embeddings_take_the_kernels_of_16_bits_where_they_are_told_so():
    """As in training: towers give float32, whatever they compute in."""
    embeddings = [draw(ROWS, 64, seed=1), draw(ROWS, 64, seed=2), draw(ROWS, 1, 64, seed=3)]
    with mock.patch.object(triton_tiles, "Panels", wraps=triton_tiles.Panels) as panels:
        ours = by(triton_tiles)(embeddings, 20.0, dtype=torch.float32, dims=(32, 64), precision="bf16")
    assert {call.args[0].queries.dtype for call in panels.call_args_list} == {torch.bfloat16}
    rounded = [each.bfloat16() for each in embeddings]
    exact = loss_and_gradients(plain_info_nce, rounded, 20.0, dtype=torch.float64, dims=(32, 64))
    assert error(ours[0], exact[0]) < TOLERANCE[torch.bfloat16][0]
    for gradient, wanted in zip(ours[1][:2], exact[1][:2], strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, wanted) < TOLERANCE[torch.bfloat16][1]


@pytest.mark.parametrize("kind", ["random", "converged", "all equal", "opposite"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 3000.0])
def test_every_scale_and_geometry_is_as_good_as_with_torch(kind, scale):
    """Opposite rows have all their cosines near -1, where a power of 2 that all rows share would underflow."""
    queries, targets = draw(40, 32, seed=1), draw(40, 32, seed=2)
    if kind == "converged":
        targets = queries + 0.01 * targets
    elif kind == "all equal":
        queries = targets = queries[:1].expand(40, 32)
    elif kind == "opposite":
        queries, targets = queries[:1] + 0.01 * queries, -queries[:1] + 0.01 * targets
        targets = torch.cat([targets[:39], -targets[39:]])  # and one that makes the powers of the others tiny
    options = {"dims": (16, 32)}
    exact = loss_and_gradients(plain_info_nce, (queries, targets), scale, dtype=torch.float64, **options)
    torchs = by(torch_tiles)((queries, targets), scale, dtype=torch.float32, **options)
    ours = by(triton_tiles)((queries, targets), scale, dtype=torch.float32, **options)
    rounding = scale * 2.0**-23 + 1e-6  # of a logit in float32
    assert error(ours[0], exact[0]) <= 2 * error(torchs[0], exact[0]) + 3e-7
    if kind != "all equal":  # whose gradients are 0 but for rounding
        for mine, other, wanted in zip(ours[1], torchs[1], exact[1], strict=True):
            assert error(mine, wanted) <= 2 * error(other, wanted) + rounding


def strip_of(first, rows=300, own=140, hard=20, width=64):
    """A rank's strip whose columns begin at pair `first`."""
    queries, targets, negatives = draw(rows, width, seed=3), draw(own, width, seed=4), draw(hard, width, seed=5)
    dims = (32, 64)

    def inverse_norm(rows):
        return torch.stack([rows[:, :dim].double().norm(dim=1).reciprocal() for dim in dims])

    return Strip(
        link="exp",
        dims=dims,
        margin=None,
        first=first,
        queries=queries,
        targets=targets,
        negatives=negatives,
        query_inverse_norm=inverse_norm(queries),
        target_inverse_norm=inverse_norm(targets),
        negative_inverse_norm=inverse_norm(negatives),
        scale=torch.tensor(20.0, dtype=torch.float64, device=DEVICE),
        bias=torch.zeros((), dtype=torch.float64, device=DEVICE),
        query_ids=torch.arange(rows, device=DEVICE) // 3,
        target_ids=None,
        positive=draw(2, rows, seed=6).double() / 4,
    )


@pytest.mark.parametrize("first", [0, 100, 160])
@pytest.mark.parametrize("bytes_of_a_launch", [None, 1])
def test_a_strip_is_that_of_the_torch_tiles_wherever_its_columns_begin(first, bytes_of_a_launch, monkeypatch):
    """Also when the memory of a launch holds no more than a single tile."""
    if bytes_of_a_launch is not None:
        monkeypatch.setattr(triton_tiles, "PARTIAL_BYTES", bytes_of_a_launch)
        monkeypatch.setattr(triton_tiles, "DERIVATIVE_BYTES", bytes_of_a_launch)
    strip = strip_of(first)
    ours, theirs = (tiles.strip_sums(strip, maxima=True) for tiles in (triton_tiles, torch_tiles))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    weight = draw(2, 300, seed=7).double()
    own = slice(first, first + 140)
    reference = torch.tensor([0.2, -0.1], dtype=torch.float64, device=DEVICE)
    given = (weight, ours.row, weight[:, own], ours.column, reference, Needs(True, True, True, True))
    ours, theirs = (tiles.strip_gradients(strip, *given) for tiles in (triton_tiles, torch_tiles))
    for mine, other in zip(ours, theirs, strict=True):
        # The last of them is one sum over the whole strip, of terms of either sign that mostly cancel here.
        assert error(mine, other) < (2e-6 if mine.ndim else 1e-5)


def test_only_what_is_needed_is_computed():
    strip = strip_of(0)
    vectors = (draw(2, 300, seed=7).double(),) * 2 + (draw(2, 140, seed=8).double(),) * 2
    vectors += (torch.zeros(2, dtype=torch.float64, device=DEVICE),)
    everything = triton_tiles.strip_gradients(strip, *vectors, Needs(True, True, True, True))
    for needs in (Needs(False, False, False, True), Needs(True, False, False, True), Needs(False, True, True, True)):
        some = triton_tiles.strip_gradients(strip, *vectors, needs)
        assert [gradient is not None for gradient in some[:3]] == list(needs[:3])
        for mine, other in zip(some, everything, strict=True):
            assert mine is None or torch.equal(mine, other)


def test_same_inputs_give_the_same_bits():
    embeddings = [draw(ROWS, 64, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    first, second = (by(triton_tiles)(embeddings, 20.0, dtype=torch.bfloat16, dims=(32, 64)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))


def test_a_zero_prefix_has_no_gradient_of_its_own_and_a_nan_comes_out():
    queries, targets = draw(20, 32, seed=1), draw(20, 32, seed=2)
    queries[3] = 0
    targets[4, :16] = 0
    _, gradients = by(triton_tiles)((queries, targets), 100.0, dtype=torch.float32, dims=(16, 32))
    _, exact = loss_and_gradients(plain_info_nce, (queries, targets), 100.0, dtype=torch.float64, dims=(16, 32))
    assert gradients[0][3].count_nonzero() == 0
    assert all(error(*pair) < 1e-5 for pair in zip(gradients, exact, strict=True))
    queries[7, 2] = torch.nan
    assert by(triton_tiles)((queries, targets), 100.0, dtype=torch.float32)[0].isnan()


def test_mixed_dtypes_and_strided_rows_are_taken_as_they_are():
    queries, targets = draw(32, 20, seed=1).T, draw(20, 70, seed=2).to(torch.bfloat16)[:, 3:35]
    with mock.patch.object(fused, "tiles_for", return_value=triton_tiles):
        ours = matryoshka_info_nce(queries, targets, temperature=0.05)
    assert error(ours, plain_info_nce(queries.double(), targets.double(), temperature=0.05)) < 2e-7


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_trial_passes_kernels_that_are_right(dtype):
    triton_check.kernels_are_right.cache_clear()
    assert triton_check.kernels_are_right(torch.device(DEVICE), dtype, "ieee")


@pytest.mark.parametrize("wrong", ["strip_sums", "strip_gradients"])
def test_the_trial_rejects_kernels_that_are_wrong_and_says_so(wrong):
    """One row lost, or not a number."""
    right = getattr(triton_tiles, wrong)
    for value in (0.0, float("nan")):

        def off(*args, _value=value, **options):
            result = right(*args, **options)
            result[0][-1] = _value
            return result

        triton_check.kernels_are_right.cache_clear()
        with mock.patch.object(triton_tiles, wrong, off), pytest.warns(RuntimeWarning, match="left to plain PyTorch"):
            assert not triton_check.kernels_are_right(torch.device(DEVICE), torch.float32, "ieee")
    triton_check.kernels_are_right.cache_clear()
