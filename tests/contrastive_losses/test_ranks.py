"""Any number of ranks gives the loss and the gradients of one process. Four real processes, started once."""

import pytest
import torch

ROWS, WIDTH, HARD, INPUTS = 8, 6, 3, 5
EVEN = {1: [8], 2: [4, 4], 4: [2, 2, 2, 2]}
UNEVEN = {1: [8], 2: [5, 3], 4: [3, 1, 2, 2]}
EMPTY_RANKS = {1: [8], 2: [0, 8], 4: [3, 0, 5, 0]}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_case(splits, upstream=1.0, **options):
    return {
        "splits": splits,
        "upstream": upstream,
        "query_inputs": draw(ROWS, INPUTS, seed=1),
        "target_inputs": draw(ROWS, INPUTS, seed=2),
        "parameters": {
            "query_encoder": draw(INPUTS, WIDTH, seed=3),
            "target_encoder": draw(INPUTS, WIDTH, seed=4),
            "temperature": torch.tensor([0.2], dtype=torch.float64),
        },
        "options": options,
    }


HARD_INPUTS = draw(ROWS, HARD, INPUTS, seed=5)  # the worker encodes them with the target encoder
IDS_ACROSS_RANKS = {  # pairs 0 and 6 share a query, 1, 4 and 7 a target: on different ranks in every split
    "query_ids": torch.tensor([5, 1, 2, 3, 4, 6, 5, 7]),
    "target_ids": torch.tensor([0, 9, 2, 3, 9, 5, 6, 9]),
}
SAMPLE_WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 0.0, 1.0], dtype=torch.float64)
LOSS_CASES = {
    "even": loss_case(EVEN),
    "uneven": loss_case(UNEVEN, dims=(2, 6)),
    "ranks without rows": loss_case(EMPTY_RANKS, dims=(6, 3), weights=(0.5, 2.0)),
    "hard negatives": loss_case(EVEN, negatives=HARD_INPUTS),
    "uneven hard negatives": loss_case(UNEVEN, negatives=HARD_INPUTS),
    "ids across ranks": loss_case(EVEN, **IDS_ACROSS_RANKS),
    "sample weights": loss_case(UNEVEN, sample_weights=SAMPLE_WEIGHTS),
    "upstream gradient": loss_case(EVEN, upstream=0.3),
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
    "nothing anywhere": (
        [{"queries": torch.ones(0, 4), "targets": torch.ones(0, 4), "temperature": 0.1}] * 4,
        "no rank has a row",
    ),
}
UNUSABLE = {
    "a 1-d query": (error_case(1, queries=torch.ones(4)), 1, r"queries have shape \[4\]"),
    "a temperature of 0": (error_case(2, temperature=0.0), 2, "temperature is 0.0"),
}


@pytest.fixture(scope="module")
def written(run_on_ranks):
    errors = {name: ranks for name, (ranks, *_) in {**DISAGREEMENTS, **UNUSABLE}.items()}
    return run_on_ranks({"loss": LOSS_CASES, "errors": errors})


def one_process(case, oracle):
    parameters = {name: value.clone().requires_grad_() for name, value in case["parameters"].items()}
    options = dict(case["options"])
    if "negatives" in options:
        options["negatives"] = options["negatives"] @ parameters["target_encoder"]
    loss = oracle(
        case["query_inputs"] @ parameters["query_encoder"],
        case["target_inputs"] @ parameters["target_encoder"],
        temperature=parameters["temperature"],
        **options,
    )
    gradients = torch.autograd.grad(case["upstream"] * loss, list(parameters.values()))
    return loss.detach().squeeze(), dict(zip(parameters, gradients, strict=True))


def assert_as_one_process(result, loss, gradients):
    torch.testing.assert_close(result["loss"], loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result["gradients"], gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", LOSS_CASES)
def test_n_ranks_give_the_loss_and_gradients_of_one_process(name, ranks, written, oracle):
    loss, gradients = one_process(LOSS_CASES[name], oracle)
    results = [rank["loss"][name, ranks] for rank in written if (name, ranks) in rank["loss"]]
    assert len(results) == ranks
    for result in results:
        assert_as_one_process(result, loss, gradients)
        assert torch.equal(result["loss"], results[0]["loss"])
        # Not only the mean over ranks: each rank holds the whole derivative by the temperature.
        own = result["own_temperature_gradient"]
        torch.testing.assert_close(own, gradients["temperature"], rtol=1e-12, atol=1e-12)
        assert torch.equal(result["accuracy"], results[0]["accuracy"])


def test_ids_hide_pairs_that_sit_on_different_ranks(oracle):
    """The case above would prove nothing if its ids changed nothing."""
    with_ids, _ = one_process(LOSS_CASES["ids across ranks"], oracle)
    without, _ = one_process(LOSS_CASES["even"], oracle)
    assert without - with_ids > 1e-3


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


def test_ranks_stay_in_step_after_errors(written, oracle):
    loss, gradients = one_process(LOSS_CASES["all at once"], oracle)
    for result in written:
        assert_as_one_process(result["after errors"], loss, gradients)


def test_a_process_outside_the_group_is_told_so(written):
    assert "not a member" in written[0]["outsider"]
