from types import SimpleNamespace

import pytest
import torch
from stage_trainer.errors import UserError
from stage_trainer.run.health import WINDOW, Health


def loss(value, hardest=0.3, accuracy=0.5):
    stats = SimpleNamespace(
        hardest_negative_cosine=torch.tensor([hardest]), query_to_target_accuracy=torch.tensor([accuracy])
    )
    return {"text": (torch.tensor(value), stats)}


def test_a_few_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    health = Health(limit=3, skipped=4)
    for applied in (False, False, True, False, False, True):
        said = health.stepped(7, applied, lambda: "The first is x.")
        assert (said is None) == applied
        assert applied or "step 7 is skipped" in said
    assert health.skipped == 8
    health.stepped(8, False, lambda: "")
    health.stepped(9, False, lambda: "")
    with pytest.raises(UserError, match=r"3 steps in a row .* the last one step 10.*The first is x\..*learning rate"):
        health.stepped(10, False, lambda: "The first is x.")


def test_a_loss_that_jumps_is_named_once_until_it_is_back():
    health = Health(limit=3)
    assert not any(health.logged(loss(2.0 - 0.01 * i)) for i in range(WINDOW))
    (warning,) = health.logged(loss(9.0))
    assert "the loss of text jumped to 9.000, from a median of 1.9" in warning
    assert health.logged(loss(9.5)) == []
    assert health.logged(loss(1.9)) == []
    assert len(health.logged(loss(9.0))) == 1


def test_the_first_losses_say_nothing():
    assert Health(limit=3).logged(loss(9.0)) == []
    health = Health(limit=3)
    assert [health.logged(loss(value)) for value in (1.0, 5.0, 30.0)] == [[], [], []]


def test_embeddings_that_are_all_alike_are_named():
    health = Health(limit=3)
    for _ in range(WINDOW):
        assert health.logged(loss(2.0, hardest=0.9, accuracy=0.02)) == []
    assert health.logged(loss(2.0, hardest=0.999, accuracy=0.8)) == [], "hard negatives may be near"
    (warning,) = health.logged(loss(2.0, hardest=0.999, accuracy=0.02))
    assert "nearly all alike" in warning
