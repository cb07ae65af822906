import pytest
import torch
from contrastive_losses import LossStats
from stage_trainer.checkpoint.state import RunState
from stage_trainer.errors import UserError
from stage_trainer.run.health import WINDOW, Health
from stage_trainer.run.hooks import Step, Totals


def loss(value, hardest=0.3, accuracy=0.5):
    stats = LossStats((8,), *(torch.tensor([number]) for number in (accuracy, accuracy, 0.9, hardest)))
    return {"text": (torch.tensor(value), stats)}


@pytest.fixture
def health():
    """With what it has said, in `said`."""
    said = []
    found = Health(3, RunState({}, {}, {}, skipped=4), said.append)
    found.said = said
    return found


def a_step(number, applied, diagnosis=""):
    totals = Totals(asked=False, tokens=0, squared_tokens=0, texts=(), corrupt=())
    return Step(number, loss(1.0), applied, diagnosis, None, 1, 1, 0.0, totals)


def test_a_few_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(health):
    for applied in (False, False, True, False, False, True):
        health.said.clear()
        health.after_step(a_step(7, applied, "The first is x."))
        assert (health.said == []) == applied
        assert applied or "step 7 is skipped" in health.said[0]
    assert health.state.skipped == 8
    health.after_step(a_step(8, False))
    health.after_step(a_step(9, False))
    with pytest.raises(UserError, match=r"3 steps in a row .* the last one step 10.*The first is x\..*learning rate"):
        health.after_step(a_step(10, False, "The first is x."))


def test_warnings_of_a_logged_step_are_shown_beside_the_count_of_skipped_ones(health):
    for number in range(WINDOW + 1):
        step = a_step(number, applied=True)
        step.losses, step.scalars = loss(9.0 if number == WINDOW else 1.0), {}
        health.after_step(step)
        assert step.scalars == {"trouble/skipped_steps": 4}
    (warning,) = health.said
    assert warning.startswith(f"step {WINDOW}: the loss of text jumped to 9.000")


def test_a_loss_that_jumps_is_named_once_until_it_is_back(health):
    assert not any(health.warnings(loss(2.0 - 0.01 * i)) for i in range(WINDOW))
    (warning,) = health.warnings(loss(9.0))
    assert "the loss of text jumped to 9.000, from a median of 1.9" in warning
    assert health.warnings(loss(9.5)) == []
    assert health.warnings(loss(1.9)) == []
    assert len(health.warnings(loss(9.0))) == 1


@pytest.mark.parametrize("values", [[9.0], [1.0, 5.0, 30.0]])
def test_the_first_losses_say_nothing(health, values):
    assert [health.warnings(loss(value)) for value in values] == [[]] * len(values)


def test_embeddings_that_are_all_alike_are_named(health):
    for _ in range(WINDOW):
        assert health.warnings(loss(2.0, hardest=0.9, accuracy=0.02)) == []
    assert health.warnings(loss(2.0, hardest=0.999, accuracy=0.8)) == [], "hard negatives may be near"
    (warning,) = health.warnings(loss(2.0, hardest=0.999, accuracy=0.02))
    assert "nearly all alike" in warning
