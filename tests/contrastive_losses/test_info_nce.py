"""The loss of one process, against cross entropies in float64 and against numbers counted by hand."""

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from contrastive_losses import InfoNCE, matryoshka_info_nce, matryoshka_sigmoid
from contrastive_losses.plain import plain_info_nce, plain_sigmoid

IDS = {"query_ids": torch.tensor([1, 2, 1, 3, 4]), "target_ids": torch.tensor([7, 8, 9, 8, 8])}
WEIGHTS = {"sample_weights": torch.tensor([1.0, 0.0, 2.5, 1.0, 0.5], dtype=torch.float64)}
CASES = {
    "plain": (0, {}),
    "hard negatives": (7, {}),
    "dims": (0, {"dims": (2, 4, 8)}),
    "dims unsorted, repeated, short of D": (0, {"dims": (5, 2, 5)}),
    "weights": (0, {"dims": (8, 2), "weights": (0.25, 3.0)}),
    "ids": (0, IDS),
    "sample weights": (0, WEIGHTS),
    "all": (3, {"dims": (8, 2, 4), "weights": (1.0, 0.5, 2.0), **IDS, **WEIGHTS}),
}


def close(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0, 1000.0])
def test_loss_and_gradients_are_those_of_cross_entropies(name, scale, oracle, make_batch):
    hard, options = CASES[name]
    embeddings = make_batch(5, hard=hard)
    temperature = torch.tensor(1 / scale, dtype=torch.float64, requires_grad=True)
    named = dict(zip(("queries", "targets", "negatives"), embeddings, strict=False))
    ours = matryoshka_info_nce(**named, temperature=temperature, **options)
    theirs = oracle(**named, temperature=temperature, **options)
    close(ours, theirs)
    inputs = [*embeddings, temperature]
    close(torch.autograd.grad(0.7 * ours, inputs), torch.autograd.grad(0.7 * theirs, inputs), 1e-11)


def test_gradients_are_the_differences_of_the_loss(make_batch):
    queries, targets, negatives = make_batch(4, width=5, hard=2)
    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def loss(queries, targets, negatives, temperature):
        return matryoshka_info_nce(
            queries,
            targets,
            negatives=negatives,
            temperature=temperature,
            dims=(2, 5),
            query_ids=torch.tensor([0, 1, 0, 2]),
            sample_weights=torch.tensor([1.0, 2.0, 0.5, 1.0]),
        )

    assert torch.autograd.gradcheck(loss, (queries, targets, negatives, temperature))


def test_denominators_of_three_pairs_counted_by_hand():
    """Cosines: query 0 meets its target at 1 and target 1 at 1 as well, all else is orthogonal. One hard negative of
    query 2 equals query 1. So at temperature 1, with e = exp(1):"""
    e = math.e
    a, b, c, d = torch.eye(4, dtype=torch.float64)
    queries = torch.stack([a, b, c])
    targets = torch.stack([a, a, c])
    negatives = torch.stack([d, d, b])[:, None]
    without = matryoshka_info_nce(queries, targets, temperature=1.0)
    query_to_target = [e / (e + e + 1), 1 / (1 + 1 + 1), e / (1 + 1 + e)]
    target_to_query = [e / (e + 1 + 1), 1 / (e + 1 + 1), e / (1 + 1 + e)]
    expected = -sum(map(math.log, query_to_target + target_to_query)) / 3
    assert without.item() == pytest.approx(expected, rel=1e-14)

    with_negatives = matryoshka_info_nce(queries, targets, negatives=negatives, temperature=1.0)
    query_to_target = [e / (e + e + 1 + 3), 1 / (1 + 1 + 1 + 1 + 1 + e), e / (1 + 1 + e + 3)]
    expected = -sum(map(math.log, query_to_target + target_to_query)) / 3
    assert with_negatives.item() == pytest.approx(expected, rel=1e-14)


def test_equal_ids_are_no_negatives_of_each_other_by_hand():
    e = math.e
    queries = targets = torch.eye(3, dtype=torch.float64)
    pair_of_three = -(2 * math.log(e / (e + 1)) + math.log(e / (e + 2))) * 2 / 3
    for ids in ({"query_ids": torch.tensor([4, 5, 4])}, {"target_ids": torch.tensor([4, 5, 4])}):
        assert matryoshka_info_nce(queries, targets, temperature=1.0, **ids).item() == pytest.approx(pair_of_three)
    # 0 and 2 share a query, 1 and 2 a target; equal numbers of the two kinds mean nothing.
    ids = {"query_ids": torch.tensor([4, 5, 4]), "target_ids": torch.tensor([5, 4, 4])}
    expected = -(math.log(e / (e + 1)) * 2 + math.log(1)) * 2 / 3
    assert matryoshka_info_nce(queries, targets, temperature=1.0, **ids).item() == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_without_any_negative_costs_nothing_and_moves_nothing(rows, make_batch):
    queries, targets = make_batch(rows)
    temperature = torch.tensor(0.05, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):  # which fails on a nan anywhere on the way
        loss, stats = matryoshka_info_nce(
            queries, targets, temperature=temperature, query_ids=torch.zeros(rows).long(), return_stats=True
        )
        loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad.count_nonzero() == 0 for tensor in (queries, targets, temperature))
    assert stats.query_to_target_accuracy.item() == stats.target_to_query_accuracy.item() == 1
    assert stats.hardest_negative_cosine.isnan().all()


def test_a_single_pair_with_hard_negatives_has_one_direction(oracle, make_batch):
    queries, targets, negatives = make_batch(1, hard=7)
    loss = matryoshka_info_nce(queries, targets, negatives=negatives, temperature=0.1)
    close(loss, oracle(queries, targets, negatives=negatives, temperature=0.1))
    assert loss > 0


def test_no_hard_negatives_is_the_same_as_none(make_batch):
    queries, targets = make_batch(3)
    none = torch.empty(3, 0, 8, dtype=torch.float64)
    with_none = matryoshka_info_nce(queries, targets, negatives=none, temperature=0.1)
    assert torch.equal(with_none, matryoshka_info_nce(queries, targets, temperature=0.1))


def test_length_of_embeddings_changes_nothing(make_batch):
    queries, targets, negatives = make_batch(4, hard=2)
    options = {"temperature": 0.1, "dims": (2, 8)}
    loss = matryoshka_info_nce(queries, targets, negatives=negatives, **options)
    longer = matryoshka_info_nce(1e3 * queries, 1e-5 * targets, negatives=7 * negatives, **options)
    close(loss, longer)


def test_a_zero_prefix_has_cosine_zero_and_no_gradient_of_its_own(make_batch):
    queries, targets = make_batch(3)
    with torch.no_grad():
        queries[1, :4] = 0  # its prefix of 4 is zero, the whole is not
        targets[2] = 0
    for dtype in (torch.float32, torch.float64):
        q, t = (rows.detach().to(dtype).requires_grad_() for rows in (queries, targets))
        loss, stats = matryoshka_info_nce(q, t, temperature=0.01, dims=(4,), return_stats=True)
        loss.backward()
        assert loss.isfinite()
        assert q.grad[1].count_nonzero() == 0
        assert t.grad[2].count_nonzero() == 0
        assert q.grad[0].count_nonzero() == 4
        cosine = torch.cosine_similarity(q[0, :4], t[0, :4], dim=0) / 3  # the two other pairs add 0
        close(stats.positive_cosine[0], cosine.detach(), 1e-6)


def test_a_row_of_weight_zero_stays_a_negative(make_batch):
    queries, targets = make_batch(2)
    weights = torch.tensor([2.0, 0.0])
    loss = matryoshka_info_nce(queries, targets, temperature=0.5, sample_weights=weights)
    cosine = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(targets, dim=1).T
    expected = -(2 * cosine).log_softmax(1)[0, 0] - (2 * cosine).log_softmax(0)[0, 0]
    close(loss, expected)
    assert matryoshka_info_nce(queries, targets, temperature=0.5, sample_weights=0 * weights).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_autocast_compute_logits_in_float32(dtype, oracle, make_batch):
    queries, targets, negatives = make_batch(6, hard=2, dtype=dtype)
    loss = {}
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss[autocast] = matryoshka_info_nce(queries, targets, negatives=negatives, temperature=0.01, dims=(4, 8))
    assert loss[True].dtype == torch.float32
    assert torch.equal(loss[True], loss[False])
    exact = [rows.detach().double() for rows in (queries, targets, negatives)]
    expected = oracle(exact[0], exact[1], negatives=exact[2], temperature=0.01, dims=(4, 8))
    assert loss[True].item() == pytest.approx(expected.item(), rel=1e-6)
    loss[True].backward()
    assert queries.grad.dtype == dtype


def test_float64_stays_float64_beside_a_float32_temperature(make_batch):
    queries, targets = make_batch(3)
    assert matryoshka_info_nce(queries, targets, temperature=torch.tensor([0.1])).dtype == torch.float64


def test_a_nearly_solved_batch_keeps_its_digits_in_float32():
    """Where log-softmax would say 0: a loss near 1e-8, whose gradient still has the right size."""
    queries = torch.eye(4, requires_grad=True)
    loss = matryoshka_info_nce(queries, torch.eye(4), temperature=0.05)
    expected = 2 * math.log1p(3 * math.exp(-20))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert queries.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_temperature_gradient_has_the_shape_of_the_temperature(shape, make_batch):
    queries, targets = make_batch(3)
    temperature = torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True)
    loss = matryoshka_info_nce(queries, targets, temperature=temperature)
    loss.backward()
    assert loss.shape == ()
    assert temperature.grad.shape == shape
    assert torch.equal(loss, matryoshka_info_nce(queries, targets, temperature=0.1))


@pytest.mark.parametrize("needs_gradient", ["queries", "targets", "temperature"])
def test_one_input_alone_may_require_a_gradient(needs_gradient, make_batch):
    queries, targets = make_batch(3)
    tensors = {"queries": queries, "targets": targets, "temperature": torch.tensor(0.1, dtype=torch.float64)}
    tensors = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    gradient = torch.autograd.grad(matryoshka_info_nce(**tensors), tensors[needs_gradient])[0]
    alone = {name: value if name == needs_gradient else value.detach() for name, value in tensors.items()}
    assert torch.equal(torch.autograd.grad(matryoshka_info_nce(**alone), alone[needs_gradient])[0], gradient)


@pytest.mark.parametrize("dims", [np.array([8, 3]), [np.int64(8), np.int32(3)], torch.tensor([8, 3]), [8, 3]])
def test_whole_numbers_of_every_kind_are_dims(dims, make_batch):
    queries, targets = make_batch(4)
    options = {"temperature": 0.1, "weights": np.array([0.5, 1.0]), "return_stats": True}
    loss, stats = matryoshka_info_nce(queries, targets, dims=dims, **options)
    assert torch.equal(loss, matryoshka_info_nce(queries, targets, dims=(8, 3), **options)[0])
    module = InfoNCE(dims, np.array([0.5, 1.0]), temperature=0.1)
    assert (stats.dims, module.dims, module.weights) == ((8, 3), (8, 3), (0.5, 1.0))
    assert {type(dim) for dim in (*stats.dims, *module.dims)} == {int}


@pytest.mark.parametrize("transform", ["grad", "jacrev", "hessian", "jacfwd", "vmap", "jvp", "dual"])
@pytest.mark.parametrize("loss", [matryoshka_info_nce, partial(matryoshka_sigmoid, bias=-1.0)])
def test_function_transforms_are_refused_with_the_form_that_has_them(transform, loss, make_batch):
    queries, targets = (each.detach() for each in make_batch(4))

    def of(loss, queries):
        return loss(queries, targets, temperature=0.1, dims=(4, 8))

    ways = {
        "vmap": lambda f: torch.func.vmap(f)(queries[None]),
        "jvp": lambda f: torch.func.jvp(f, (queries,), (queries,)),
        "dual": lambda f: f(torch.autograd.forward_ad.make_dual(queries, queries)),
    }
    way = ways.get(transform, lambda f: getattr(torch.func, transform)(f)(queries))
    with torch.autograd.forward_ad.dual_level() if transform == "dual" else nullcontext():
        with pytest.raises(RuntimeError, match=r"plain_info_nce and plain_sigmoid in contrastive_losses\.plain"):
            way(partial(of, loss))
        plain = plain_info_nce if loss is matryoshka_info_nce else partial(plain_sigmoid, bias=-1.0)
        way(partial(of, plain))
    if transform == "grad":
        expected = torch.autograd.grad(of(loss, inputs := queries.clone().requires_grad_()), inputs)[0]
        torch.testing.assert_close(torch.func.grad(partial(of, plain))(queries), expected, rtol=1e-9, atol=1e-12)


BAD_INPUT = {
    "3-d queries": ({"queries": torch.ones(3, 2, 4)}, r"queries have shape \[3, 2, 4\]"),
    "other targets": ({"targets": torch.ones(4, 4)}, r"targets have shape \[4, 4\] but queries \[3, 4\]"),
    "flat negatives": ({"negatives": torch.ones(21, 4)}, r"expected \[3, K, 4\]"),
    "negatives of others": ({"negatives": torch.ones(2, 7, 4)}, r"expected \[3, K, 4\]"),
    "integers": ({"targets": torch.ones(3, 4).long()}, "floating-point"),
    "no rows": ({"queries": torch.ones(0, 4), "targets": torch.ones(0, 4)}, "no rows"),
    "ids of others": ({"query_ids": torch.arange(4)}, r"query_ids .* \[4\]; expected .*\[3\]"),
    "ids in float": ({"target_ids": torch.ones(3)}, "target_ids are torch.float32"),
    "sample weights of others": ({"sample_weights": torch.ones(2)}, r"sample_weights .* \[2\]"),
    "negative sample weight": ({"sample_weights": torch.tensor([1.0, -1.0, 1.0])}, "0 or more"),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0"),
    "temperature nan": ({"temperature": float("nan")}, "temperature is nan"),
    "negative temperature": ({"temperature": torch.tensor([-0.1], requires_grad=True)}, "temperature is -0.1"),
    "two temperatures": ({"temperature": torch.ones(2)}, r"temperature has shape \[2\]"),
    "dim above D": ({"dims": (2, 5)}, "dims hold 5; .* 1 to D = 4"),
    "dim 0": ({"dims": (0,)}, "dims hold 0"),
    "no dims": ({"dims": ()}, "empty"),
    "weights of others": ({"dims": (2, 4), "weights": (1.0,)}, "1 weights for 2 dims"),
    "a weight that is nan": ({"dims": (2, 4), "weights": (1.0, float("nan"))}, "expected finite numbers"),
    "margin": ({"false_negative_margin": 3.0}, "false_negative_margin is 3.0"),
    "dims that are no sequence": ({"dims": 4}, "dims are 4; expected a list or tuple"),
    "dims in a text": ({"dims": "24"}, "dims are '24'; expected a list or tuple"),
    "dims in no order": ({"dims": {2, 4}}, r"dims are \{2, 4\}; expected a list or tuple"),
    "dims with their weights": ({"dims": {4: 0.5}}, r"dims are \{4: 0.5\}; expected a list or tuple"),
    "dims once only": ({"dims": map(int, "24")}, "dims are <map.*; expected a list or tuple"),
    "dims of a generator": ({"dims": (d for d in (2, 4))}, "dims are <generator.*; expected a list or tuple"),
    "dims that are numpy's one": ({"dims": np.array(4)}, r"dims are array\(4\); expected a list or tuple"),
    "dims that are torch's one": ({"dims": torch.tensor(4)}, r"dims are tensor\(4\); expected a list or tuple"),
    "dims in bytes": ({"dims": b"\x04"}, r"dims are b.*; expected a list or tuple"),
    "a weight in a text": ({"dims": (4,), "weights": ["a"]}, r"weights are \('a',\); expected finite numbers"),
    "a weight in rows": ({"dims": (4,), "weights": [[1, 2]]}, r"weights are \(\[1, 2\],\); expected finite numbers"),
    "weights by dim": ({"dims": (4,), "weights": {4: 0.5}}, r"weights are \{4: 0.5\}; expected a list or tuple"),
    "a dim that is true": ({"dims": (True,)}, "dims hold True; expected whole numbers"),
    "numpy's true": ({"dims": np.array([True, True])}, "dims hold .*True.*; expected whole numbers"),
    "a dim in float": ({"dims": np.array([2.0])}, "dims hold .*2.0.*; expected whole numbers"),
    "numpy's dim above D": ({"dims": np.array([2, 5])}, "dims hold .*5.*; .* 1 to D = 4"),
    "temperature true": ({"temperature": True}, "temperature is True; expected a number"),
    "another device": ({"targets": torch.ones(3, 4, device="meta")}, "targets are on meta but queries on cpu"),
    "weights without dims": ({"weights": (1.0, 2.0)}, "2 weights for 1 dims"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_with_what_was_found_and_expected(name):
    changes, message = BAD_INPUT[name]
    arguments = {"queries": torch.ones(3, 4), "targets": torch.ones(3, 4), "temperature": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        matryoshka_info_nce(**arguments)
