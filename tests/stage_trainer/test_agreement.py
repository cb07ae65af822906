"""Ranks of several machines that do not train the same end at once, with one message."""

import threading

import pytest
from stage_trainer.errors import UserError
from stage_trainer.run.agreement import check_same_recipe, difference
from torch._C._distributed_c10d import HashStore

RECIPE = {"stage": 1, "name": "big", "batch": (4, 8)}


def outcomes(recipes, refusals=None, store=None):
    """How each rank ends: None, or the error."""
    store, ends = store or HashStore(), {}

    def run(rank):
        try:
            refusal = (refusals or {}).get(rank)
            ends[rank] = check_same_recipe(store, rank, len(recipes), recipes[rank], refusal)
        except (UserError, SystemExit) as error:
            ends[rank] = error

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(len(recipes))]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    return [ends[rank] for rank in range(len(recipes))]


def test_ranks_with_one_recipe_go_on():
    assert outcomes([RECIPE] * 3) == [None] * 3


def test_a_rank_with_another_recipe_ends_all_and_rank_0_names_it_and_the_first_key():
    first, second, third = outcomes([RECIPE, RECIPE, {**RECIPE, "name": "laptop", "batch": (1,)}])
    assert isinstance(first, UserError)
    assert "rank 2 (on " in str(first)
    assert "its name is 'laptop', and that of rank 0 is 'big'" in str(first)
    assert "bash launch/stageN.sh" in str(first)
    assert [second.code, third.code] == [2, 2]


def test_a_key_that_one_lacks_is_a_difference_too():
    (first, _) = outcomes([{**RECIPE, "device": "cpu"}, RECIPE])
    assert "its device is None, and that of rank 0 is 'cpu'" in str(first)


def test_a_rank_that_cannot_start_ends_all_with_its_reason():
    first, second = outcomes([RECIPE] * 2, {1: UserError("this machine has an NVIDIA GPU, …")})
    assert str(first) == "this machine has an NVIDIA GPU, …"
    assert second.code == 2


def test_a_rank_that_comes_too_late_and_with_another_recipe_says_so_itself():
    store = HashStore()
    assert outcomes([RECIPE] * 2, store=store) == [None] * 2
    with pytest.raises(UserError, match="rank 1 .* has another recipe than rank 0"):
        check_same_recipe(store, 1, 2, {**RECIPE, "name": "other"})


def test_other_data_is_named_with_what_to_do():
    text = difference("data", (1, "b", {"d": "1"}), ("a", {"d": "2"}), "copy them")
    assert (
        text == "rank 1 (on b) has another data than rank 0 (on a): its d is '1', and that of rank 0 is '2'; copy them"
    )
