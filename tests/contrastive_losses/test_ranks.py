"""Any number of ranks gives the loss and the gradients of one process. Four real processes, started once."""

import pytest
import torch
from contrastive_losses import UnifiedInfoNCE, matryoshka_info_nce, matryoshka_sigmoid
from contrastive_losses.plain import plain_cosent, plain_info_nce, plain_margin_mse, plain_sigmoid

ROWS, WIDTH, HARD, INPUTS = 8, 6, 3, 5
EVEN = {1: [8], 2: [4, 4], 4: [2, 2, 2, 2]}
UNEVEN = {1: [8], 2: [5, 3], 4: [3, 1, 2, 2]}
EMPTY_RANKS = {1: [8], 2: [0, 8], 4: [3, 0, 5, 0]}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_case(splits, upstream=1.0, bias=None, **options):
    scalars = {} if bias is None else {"bias": torch.tensor(bias, dtype=torch.float64)}
    return {
        "splits": splits,
        "upstream": upstream,
        "query_inputs": draw(ROWS, INPUTS, seed=1),
        "target_inputs": draw(ROWS, INPUTS, seed=2),
        "parameters": {
            "query_encoder": draw(INPUTS, WIDTH, seed=3),
            "target_encoder": draw(INPUTS, WIDTH, seed=4),
            "temperature": torch.tensor([0.2], dtype=torch.float64),
            **scalars,
        },
        "options": options,
    }


HARD_INPUTS = draw(ROWS, HARD, INPUTS, seed=5)  # the worker encodes them with the target encoder
IDS_ACROSS_RANKS = {  # pairs 0 and 6 share a query, 1, 4 and 7 a target: on different ranks in every split
    "query_ids": torch.tensor([5, 1, 2, 3, 4, 6, 5, 7]),
    "target_ids": torch.tensor([0, 9, 2, 3, 9, 5, 6, 9]),
}
SAMPLE_WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 0.0, 1.0], dtype=torch.float64)
SCORES = torch.tensor([0.0, 4.0, 2.5, 2.5, 5.0, 1.0, 0.0, 4.0])
MARGIN_SCORES = 5 * draw(ROWS, 1 + HARD, seed=6)
LOSS_CASES = {
    "even": loss_case(EVEN),
    "uneven": loss_case(UNEVEN, dims=(2, 6)),
    "ranks without rows": loss_case(EMPTY_RANKS, dims=(6, 3), weights=(0.5, 2.0)),
    "hard negatives": loss_case(EVEN, negatives=HARD_INPUTS),
    "uneven hard negatives": loss_case(UNEVEN, negatives=HARD_INPUTS),
    "ids across ranks": loss_case(EVEN, **IDS_ACROSS_RANKS),
    "sample weights": loss_case(UNEVEN, sample_weights=SAMPLE_WEIGHTS),
    "upstream gradient": loss_case(EVEN, upstream=0.3),
    "margin": loss_case(UNEVEN, negatives=HARD_INPUTS, dims=(3, 6), false_negative_margin=0.2),
    "cosent": loss_case(EMPTY_RANKS, upstream=0.3, scores=SCORES, dims=(6, 3), weights=(0.5, 2.0)),
    "cosent, uneven": loss_case(UNEVEN, scores=SCORES),
    "margin-mse": loss_case(
        EMPTY_RANKS, upstream=0.3, negatives=HARD_INPUTS, scores=MARGIN_SCORES, dims=(6, 3), weights=(0.5, 2.0)
    ),
    "margin-mse, uneven": loss_case(UNEVEN, negatives=HARD_INPUTS, scores=MARGIN_SCORES),
    "sigmoid": loss_case(UNEVEN, bias=-2.0, dims=(3, 6)),
    "sigmoid, all at once": loss_case(
        EMPTY_RANKS,
        upstream=-2.0,
        bias=1.0,
        negatives=HARD_INPUTS,
        dims=(4, 2, 6, 2),
        weights=(1.0, 0.5, 2.0, 0.25),
        sample_weights=SAMPLE_WEIGHTS,
        false_negative_margin=0.5,
        **IDS_ACROSS_RANKS,
    ),
    "all at once": loss_case(
        EMPTY_RANKS,
        upstream=-2.0,
        negatives=HARD_INPUTS,
        dims=(4, 2, 6, 2),
        weights=(1.0, 0.5, 2.0, 0.25),
        sample_weights=SAMPLE_WEIGHTS,
        **IDS_ACROSS_RANKS,
    ),
}


LOSS_CASES |= {  # the same, their queries passed round instead of gathered
    f"{name}, in a ring": {**case, "options": {**case["options"], "exchange": "ring"}}
    for name, case in LOSS_CASES.items()
    if "scores" not in case["options"]
}


UNIFIED = {
    "parts": {
        name: (draw(rows, 6, seed=7 * k), draw(rows, 6, seed=7 * k + 1))
        for k, (name, rows) in enumerate({"image_text": 86, "text": 77, "image_views": 86}.items())
    },
    "text_ids": torch.arange(77) % 50,
}


def error_case(odd_rank, **changes):
    """The arguments of four ranks, of which one differs."""
    good = {
        "queries": torch.ones(2, 4),
        "targets": torch.ones(2, 4),
        "negatives": torch.ones(2, 3, 4),
        "temperature": 0.1,
    }
    return [{**good, **(changes if rank == odd_rank else {})} for rank in range(4)]


DISAGREEMENTS = {
    "K": (error_case(2, negatives=torch.ones(2, 1, 4)), r"hard negatives K .*\[3, 3, 1, 3\]"),
    "no negatives": (error_case(1, negatives=None), r"hard negatives K .*\[3, -1, 3, 3\]"),
    "D": (
        error_case(0, queries=torch.ones(2, 5), targets=torch.ones(2, 5), negatives=torch.ones(2, 3, 5)),
        r"width D: \[5, 4, 4, 4\]",
    ),
    "ids": (error_case(3, query_ids=torch.arange(2)), r"query_ids .*\[0, 0, 0, 1\]"),
    "dims": (error_case(3, dims=(2, 4)), "dims and their weights"),
    "dtype": (error_case(3, queries=torch.ones(2, 4, dtype=torch.float64)), "dtypes"),
    "margin": (error_case(3, false_negative_margin=0.1), "margin"),
    "temperature": (error_case(3, temperature=0.3), "temperature"),
    "exchange": (error_case(3, exchange="ring"), "exchange"),
    "return_stats": (error_case(3, return_stats=True), r"return_stats: \[0, 0, 0, 1\]"),
    "grad mode": (error_case(3, grad_enabled=False), r"is_grad_enabled\(\): \[1, 1, 1, 0\]"),
    "nothing anywhere": (
        [{"queries": torch.ones(0, 4), "targets": torch.ones(0, 4), "temperature": 0.1}] * 4,
        "no rank has a row",
    ),
}
UNUSABLE = {
    "a 1-d query": (error_case(1, queries=torch.ones(4)), 1, r"queries have shape \[4\]"),
    "a temperature of 0": (error_case(2, temperature=0.0), 2, "temperature is 0.0"),
    "dims that are no sequence": (error_case(3, dims=5), 3, "dims are 5; expected a list or tuple"),
    "dims of no dimension": (error_case(2, dims=torch.tensor(4)), 2, r"dims are tensor\(4\); expected a list"),
    "weights in a text": (error_case(1, dims=(4,), weights=["a"]), 1, r"weights are \('a',\); expected finite numbers"),
    "a list for a tensor": (error_case(0, targets=[1.0, 2.0]), 0, "arguments cannot be read .*AttributeError"),
    "an exchange that there is not": (error_case(2, exchange="tree"), 2, "exchange is 'tree'; expected one of auto, "),
    "no queries": (error_case(1, queries=None), 1, "arguments cannot be read .*AttributeError"),
}


@pytest.fixture(scope="module")
def written(run_on_ranks):
    errors = {name: ranks for name, (ranks, *_) in {**DISAGREEMENTS, **UNUSABLE}.items()}
    return run_on_ranks({"loss": LOSS_CASES, "errors": errors, "unified": UNIFIED})


def one_process(case, info_nce=matryoshka_info_nce, sigmoid=matryoshka_sigmoid, **more):
    """(loss, gradients), or with `more` what the function returns."""
    parameters = {name: value.clone().requires_grad_() for name, value in case["parameters"].items()}
    options = {name: value for name, value in case["options"].items() if name != "exchange"}
    if "negatives" in options:
        options["negatives"] = options["negatives"] @ parameters["target_encoder"]
    if "bias" in parameters:
        options["bias"] = parameters["bias"]
    result = (sigmoid if "bias" in parameters else info_nce)(
        case["query_inputs"] @ parameters["query_encoder"],
        case["target_inputs"] @ parameters["target_encoder"],
        temperature=parameters["temperature"],
        **options,
        **more,
    )
    if more:
        return result
    loss = result
    gradients = torch.autograd.grad(case["upstream"] * loss, list(parameters.values()))
    return loss.detach().squeeze(), dict(zip(parameters, gradients, strict=True))


def assert_as_one_process(result, loss, gradients):
    torch.testing.assert_close(result["loss"], loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result["gradients"], gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", LOSS_CASES)
def test_n_ranks_give_the_loss_and_gradients_of_one_process(name, ranks, written):
    case = LOSS_CASES[name]
    graded = "scores" in case["options"]
    plain = (plain_margin_mse if "negatives" in case["options"] else plain_cosent) if graded else plain_info_nce
    loss, gradients = one_process(case, plain, plain_sigmoid)
    stats = None if graded else one_process(case, return_stats=True)[1]
    results = [rank["loss"][name, ranks] for rank in written if (name, ranks) in rank["loss"]]
    assert len(results) == ranks
    for result in results:
        assert_as_one_process(result, loss, gradients)
        assert torch.equal(result["loss"], results[0]["loss"])
        # Not only the mean over ranks: each rank holds the whole derivative by the temperature.
        own = result["own_temperature_gradient"]
        torch.testing.assert_close(own, gradients["temperature"], rtol=1e-12, atol=1e-12)
        for field, value in vars(stats).items() if stats else ():
            torch.testing.assert_close(result["stats"][field], value, rtol=1e-12, atol=1e-12)


def test_a_rings_memory_is_that_of_a_ranks_own_rows_however_many_ranks_there_are(written):
    memory = written[3]["memory"]
    of_ring, of_gather = ({kind: [memory[name, size][kind] for size in (2, 4)] for kind in ("peak", "largest")}
                          for name in ("ring", "gather"))  # fmt: skip
    assert of_ring["peak"][1] < 1.02 * of_ring["peak"][0]
    assert of_ring["largest"][1] == of_ring["largest"][0]
    own = 256 * 64 * 4
    assert of_gather["largest"] == [2 * own, 4 * own], "this measure sees what is gathered"
    assert of_gather["peak"][1] > of_gather["peak"][0] + 4 * own


def test_a_ring_is_taken_where_the_gathered_queries_would_not_fit():
    from contrastive_losses import fused

    assert not fused.goes_round("auto", 1, 10**9, 1024, 6), "there is nobody else"
    assert not fused.goes_round("auto", 8, 2**15, 1024, 6)
    assert fused.goes_round("auto", 256, 2**20, 1024, 6)
    assert fused.goes_round("ring", 2, 4, 8, 8)
    assert not fused.goes_round("gather", 256, 2**20, 1024, 6)


def test_ids_hide_pairs_that_sit_on_different_ranks():
    """The case above would prove nothing if its ids changed nothing."""
    with_ids, _ = one_process(LOSS_CASES["ids across ranks"])
    without, _ = one_process(LOSS_CASES["even"])
    assert without - with_ids > 1e-3


@pytest.mark.parametrize("made", ["images", "images and texts"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_unified_batch_of_n_ranks_is_that_of_one_process(size, made, written):
    """Rows without ids are told apart on all ranks, however many a rank has, and each image meets its own views."""
    module = UnifiedInfoNCE(dims=(3, 6), temperature=0.2)
    parts = {name: tuple(side.clone().requires_grad_() for side in pair) for name, pair in UNIFIED["parts"].items()}
    assert all(len(pair[0]) > 17 * 4 for pair in parts.values())
    loss = module(**parts, text_ids=UNIFIED["text_ids"] if made == "images" else None)
    loss.backward()
    for rank, result in enumerate(written[-size:]):
        result = result["unified"][made, size]
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(result["log_scale"], module.log_scale.grad)
        for name, pair in parts.items():
            for side, gradient in zip(pair, result["gradients"][name], strict=True):
                own = side.grad.tensor_split(size)[rank]
                torch.testing.assert_close(gradient, own, rtol=1e-12, atol=1e-12)


def test_unified_ids_given_on_one_rank_and_made_on_another_are_refused(written):
    for rank in written:
        assert "differ in the loss, dims and their weights" in rank["unified ids"]
        assert "which ids are made" in rank["unified ids"]


def test_a_nan_on_one_rank_is_a_nan_on_all_and_leaves_them_in_step(written):
    for rank in written:
        assert rank["nan"]["loss"].isnan()
        assert rank["nan"]["gradient"].isnan().any()


def test_a_rank_that_needs_no_gradient_takes_part_in_those_of_the_others(written):
    results = [rank["without gradient"] for rank in written]
    queries = torch.cat([result["queries"] for result in results]).requires_grad_()
    matryoshka_info_nce(queries, torch.cat([result["targets"] for result in results]), temperature=0.2).backward()
    assert results[1]["gradient"] is None
    for rank in (0, 2, 3):
        expected = 4 * queries.grad[2 * rank : 2 * rank + 2]
        torch.testing.assert_close(results[rank]["gradient"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_all_get_the_same_error(name, written):
    messages = {rank["errors"][name] for rank in written}
    assert len(messages) == 1
    with pytest.raises(ValueError, match=DISAGREEMENTS[name][1]):
        raise ValueError(messages.pop())


@pytest.mark.parametrize("name", UNUSABLE)
def test_bad_input_on_one_rank_is_an_error_on_all(name, written):
    _, bad_rank, message = UNUSABLE[name]
    for rank, result in enumerate(written):
        expected = message if rank == bad_rank else rf"rank\(s\) \[{bad_rank}\] of the group"
        with pytest.raises(ValueError, match=expected):
            raise ValueError(result["errors"][name])


def test_ranks_stay_in_step_after_errors(written):
    loss, gradients = one_process(LOSS_CASES["all at once"])
    for result in written:
        assert_as_one_process(result["after errors"], loss, gradients)


def test_unified_parts_that_do_not_fit_on_one_rank_are_an_error_on_all(written):
    assert "text: targets have shape [2, 3]" in written[1]["unified error"]
    for rank in (0, 2, 3):
        assert "rank(s) [1] of the group" in written[rank]["unified error"]


def test_a_process_outside_the_group_is_told_so(written):
    assert "not a member" in written[0]["outsider"]
