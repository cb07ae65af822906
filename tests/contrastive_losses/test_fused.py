"""The fused loss against its plain definition, over tile edges and in both ways of taking exponentials."""

import itertools

import pytest
import torch
from contrastive_losses import matryoshka_info_nce, matryoshka_sigmoid, torch_tiles
from contrastive_losses.plain import plain_info_nce, plain_sigmoid

LOSSES = {"info_nce": (matryoshka_info_nce, plain_info_nce), "sigmoid": (matryoshka_sigmoid, plain_sigmoid)}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(torch_tiles, "CPU_TILE", (3, 4))


def value_and_gradients(loss, inputs, **options):
    """In float64, whatever the inputs are; those of `inputs` that are None are left out."""
    given = {name: value for name, value in inputs.items() if value is not None}
    result = loss(**given, **options)
    return [result, *torch.autograd.grad(1.7 * result, list(given.values()))]


def draw(name, rows=10, hard=0, seed=0, width=8, scale=20.0):
    """What a loss is differentiated by, and the options that go with it."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "queries": torch.randn(rows, width, generator=generator, dtype=torch.float64),
        "targets": torch.randn(rows, width, generator=generator, dtype=torch.float64),
        "negatives": torch.randn(rows, hard, width, generator=generator, dtype=torch.float64) if hard else None,
        "temperature": torch.tensor([1 / scale], dtype=torch.float64),
    }
    if name == "sigmoid":
        inputs["bias"] = torch.tensor(-2.0, dtype=torch.float64)
    options = {
        "dims": (5, 2, 8),
        "weights": (1.0, 0.5, 2.0),
        "query_ids": torch.randint(0, 8, (rows,), generator=generator),
        "target_ids": torch.randint(0, 8, (rows,), generator=generator),
        "sample_weights": torch.rand(rows, generator=generator),
    }
    return {key: None if value is None else value.requires_grad_() for key, value in inputs.items()}, options


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 300.0, 5000.0])
@pytest.mark.parametrize("margin", [None, 0.1, -0.3])
def test_fused_is_plain_over_tile_edges(name, hard, scale, margin, small_tiles):
    fused, plain = LOSSES[name]
    inputs, options = draw(name, hard=hard, scale=scale)
    options["false_negative_margin"] = margin
    ours, theirs = (value_and_gradients(loss, inputs, **options) for loss in (fused, plain))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10 * float(right.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_shared_and_separate_exponentials_agree(dtype, scale, monkeypatch, small_tiles):
    inputs, options = draw("info_nce", hard=2, scale=scale)
    inputs = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    used = []
    window = torch_tiles._is_within_window
    monkeypatch.setattr(torch_tiles, "_is_within_window", lambda *a: used.append(window(*a)) or used[-1])
    shared = value_and_gradients(matryoshka_info_nce, inputs, **options)
    assert used == [True, True]  # else this test compares a thing with itself
    monkeypatch.setattr(torch_tiles, "_shared_shift", lambda strip: None)
    separate = value_and_gradients(matryoshka_info_nce, inputs, **options)
    for left, right in zip(shared, separate, strict=True):
        tolerance = scale * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * float(right.detach().abs().max()))


def test_rows_far_from_everything_are_noticed_and_computed_apart(monkeypatch):
    """At scale 100 one query is antipodal to all targets, its own too: a power of 2 shared by all rows would be 0."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.ones(50, 16) + 0.05 * torch.randn(50, 16, generator=generator)
    queries = torch.ones(50, 16) + 0.05 * torch.randn(50, 16, generator=generator)
    queries[7] *= -1
    options = {"temperature": 0.01, "dims": (4, 16)}
    exact = plain_info_nce(queries.double(), targets.double(), **options).item()
    assert matryoshka_info_nce(queries, targets, **options).item() == pytest.approx(exact, rel=1e-6)
    monkeypatch.setattr(torch_tiles, "_is_within_window", lambda *_: True)
    assert abs(matryoshka_info_nce(queries, targets, **options).item() / exact - 1) > 1e-3


def test_a_margin_leaves_out_what_beats_the_positive_by_more_than_it():
    """Query 0 meets its target at 0.6 and target 1 at 0.8; a margin of 0.1 hides target 1 from it, 0.3 does not. The
    column of target 1 (own cosine 1) keeps query 0 either way."""
    queries = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    targets = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    cosine = queries @ targets.T
    torch.testing.assert_close(cosine, torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64))
    softplus = torch.nn.functional.softplus
    kept = softplus(cosine[0, 1] - cosine[0, 0])
    others = softplus(cosine[1, 0] - cosine[1, 1]) + softplus(cosine[1, 0] - cosine[0, 0])
    others = others + softplus(cosine[0, 1] - cosine[1, 1])
    for margin, hidden in ((0.1, True), (0.3, False), (None, False)):
        loss = matryoshka_info_nce(queries, targets, temperature=1.0, false_negative_margin=margin)
        torch.testing.assert_close(loss, (others + (0.0 if hidden else kept)) / 2)
    hard = torch.tensor([[[0.8, 0.6]], [[0.0, -1.0]]], dtype=torch.float64)  # the first one beats query 0's positive
    fewer = matryoshka_info_nce(queries, targets, temperature=1.0, negatives=hard, false_negative_margin=0.1)
    torch.testing.assert_close(
        fewer, plain_info_nce(queries, targets, temperature=1.0, negatives=hard, false_negative_margin=0.1)
    )
    assert fewer < matryoshka_info_nce(queries, targets, temperature=1.0, negatives=hard)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_differences_of_the_loss(name, small_tiles):
    inputs, options = draw(name, rows=5, hard=2, scale=3.0)
    names = list(inputs)

    def loss(*values):
        return LOSSES[name][0](**dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(loss, tuple(inputs.values()))


@pytest.mark.parametrize("wanted", itertools.combinations(["queries", "targets", "negatives", "temperature"], 2))
def test_any_inputs_may_require_a_gradient(wanted, small_tiles):
    inputs, options = draw("info_nce", hard=2)
    expected = dict(zip(inputs, value_and_gradients(matryoshka_info_nce, inputs, **options)[1:], strict=True))
    some = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
    loss = matryoshka_info_nce(**some, **options)
    for name, gradient in zip(wanted, torch.autograd.grad(1.7 * loss, [some[name] for name in wanted]), strict=True):
        assert torch.equal(gradient, expected[name])


def test_backward_may_be_taken_twice_and_the_graph_is_freed_after_it():
    inputs, options = draw("info_nce", hard=1)
    loss = matryoshka_info_nce(**inputs, **options)
    loss.backward(retain_graph=True)
    first = inputs["queries"].grad.clone()
    loss.backward()
    assert torch.equal(inputs["queries"].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_gradients_are_refused_not_wrong():
    inputs, options = draw("info_nce")
    loss = matryoshka_info_nce(**inputs, **options)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(loss, inputs["queries"], create_graph=True)


def test_inputs_changed_between_forward_and_backward_are_noticed():
    inputs, options = draw("info_nce")
    loss = matryoshka_info_nce(**inputs, **options)
    with torch.no_grad():
        inputs["targets"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [None, 0.1])
def test_same_inputs_give_the_same_bits(name, margin, small_tiles):
    inputs, options = draw(name, rows=40, hard=2)
    inputs = {key: value.detach().float().requires_grad_() for key, value in inputs.items()}
    options["false_negative_margin"] = margin
    first, second = (value_and_gradients(LOSSES[name][0], inputs, **options) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_embeddings_in_chunks_give_the_gradients_of_one_pass(make_batch):
    """Gradient caching: embed without a graph, take the loss's gradients, then embed chunk by chunk to pass them on."""
    inputs, _ = make_batch(12, width=6)
    encoders = [torch.nn.Linear(6, 8, dtype=torch.float64) for _ in range(2)]
    options = {"temperature": 0.1, "dims": (4, 8)}
    matryoshka_info_nce(*(encoder(inputs) for encoder in encoders), **options).backward()
    expected = [encoder.weight.grad.clone() for encoder in encoders]
    for encoder in encoders:
        encoder.zero_grad()
    with torch.no_grad():
        cached = [encoder(inputs) for encoder in encoders]
    cached = [embeddings.requires_grad_() for embeddings in cached]
    matryoshka_info_nce(*cached, **options).backward()
    for encoder, embeddings in zip(encoders, cached, strict=True):
        for chunk, gradient in zip(inputs.split(5), embeddings.grad.split(5), strict=True):
            encoder(chunk).backward(gradient)
    for encoder, gradient in zip(encoders, expected, strict=True):
        torch.testing.assert_close(encoder.weight.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["queries", "targets", "negatives"])
def test_a_nan_or_infinite_embedding_makes_the_loss_and_its_gradients_nan(name, poison, where):
    """As a cross entropy does, so that loss scaling notices it; never a finite number that hides it."""
    inputs, _ = draw(name, hard=2)
    with torch.no_grad():
        inputs[where].view(-1, 8)[3, 1] = poison
    loss, *gradients = value_and_gradients(LOSSES[name][0], inputs, dims=(4, 8))
    assert loss.isnan()
    gradients = dict(zip(inputs, gradients, strict=True))
    assert gradients[where].isnan().any()
    assert gradients["temperature"].isnan().all()
    if name == "info_nce":  # whose rows and columns each depend on all others; hard negatives are in no column
        assert gradients["queries"].isnan().all(1).any()


def test_a_nan_beyond_every_prefix_is_never_read():
    inputs, _ = draw("info_nce")
    with torch.no_grad():
        inputs["queries"][0, 7] = float("nan")
    loss, *gradients = value_and_gradients(matryoshka_info_nce, {**inputs, "negatives": None}, dims=(4, 6))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
