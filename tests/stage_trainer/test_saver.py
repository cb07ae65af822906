"""Saving in the background, in one process: what is kept, and what is said when it cannot be written."""

import json
import threading

import pytest
import torch
from stage_trainer.checkpoint import save as checkpoint
from stage_trainer.checkpoint.load import all_saved
from stage_trainer.checkpoint.save import Saver
from stage_trainer.checkpoint.state import RunState
from stage_trainer.commands.common import find_model
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine.base import without_weights
from stage_trainer.errors import UserError

from .conftest import make_model


def state_at(step, **counted):
    return RunState({}, {}, {}, step=step, **counted)


class Training:
    """What a saver needs of an engine."""

    def __init__(self):
        self.model = make_model()
        self.shell = without_weights(self.model)
        self.moment = torch.zeros(1)

    def optimizer_state(self):
        yield "logit_scale|exp_avg", self.moment

    def copy_of_weights(self):
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def go_on(self, step):
        with torch.no_grad():
            self.model.logit_scale.fill_(step)
            self.moment.fill_(step)


def steps_of(directory):
    return [saved.step for saved in all_saved(directory)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_stay(alone, tmp_path, keep):
    engine = Training()
    with Saver(tmp_path, keep) as saver:
        for step in range(1, 7):
            saver.save(engine, state_at(step), {"metric": "recall", "value": step} if step in (1, 2) else None)
            saver.finish()
            assert steps_of(tmp_path) == sorted(
                {*([2] if step > 1 else [1]), *range(max(1, step + 1 - keep), step + 1)}
            )
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"metric": "recall", "value": 2, "step": 2}


def test_the_best_one_makes_room_for_a_better_one(alone, tmp_path):
    engine = Training()
    with Saver(tmp_path, 1) as saver:
        for step in (1, 2, 3, 4, 5):
            saver.save(engine, state_at(step), {"metric": "recall", "value": step} if step in (1, 3) else None)
    assert steps_of(tmp_path) == [3, 5]
    assert json.loads((tmp_path / "best.json").read_text()) == {"metric": "recall", "value": 3, "step": 3}


def test_checkpoints_of_later_steps_are_not_counted_nor_removed(alone, tmp_path):
    """Damaged ones, from which the run did not go on."""
    engine = Training()
    with Saver(tmp_path, 1) as saver:
        for step in (2, 8, 9, 3):
            saver.save(engine, state_at(step))
    assert steps_of(tmp_path) == [3, 9]


def test_what_is_saved_is_the_model_at_that_step_however_long_writing_takes(alone, tmp_path, monkeypatch):
    engine, write, let_go = Training(), checkpoint.write, threading.Event()

    def slow(*arguments):
        assert let_go.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write", slow)
    with Saver(tmp_path, 2) as saver:
        engine.go_on(5)
        saver.save(engine, state_at(5, skipped=1))
        engine.go_on(6)
        assert steps_of(tmp_path) == []
        let_go.set()
    (saved,) = all_saved(tmp_path)
    assert DualEncoder.from_pretrained(saved.model).logit_scale.item() == 5
    assert saved.optimizer()["logit_scale|exp_avg"].item() == 5
    assert {name: saved.state()[name] for name in ("step", "skipped")} == {"step": 5, "skipped": 1}
    assert all(parameter.is_meta for parameter in engine.shell.parameters()), "the copy's memory is free again"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("the disk is full"), "^the disk is full$"),
        (RuntimeError("odd"), "could not write a checkpoint to .*: RuntimeError: odd"),
    ],
)
def test_what_could_not_be_written_is_said_once_and_later_ones_are_written(alone, tmp_path, monkeypatch, error, words):
    engine, saver = Training(), Saver(tmp_path, 2)

    def fails(*_):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write", fails)
        saver.save(engine, state_at(1))
        saver._thread.join()
    assert saver.failed
    with pytest.raises(UserError, match=words):
        saver.finish()
    assert not saver.failed
    saver.save(engine, state_at(2))
    saver.finish()
    assert steps_of(tmp_path) == [2]


def test_leaving_by_an_exception_waits_and_does_not_hide_it(alone, tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "write", fails)

    def fall_over():
        with Saver(tmp_path, 2) as saver:
            saver.save(Training(), state_at(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fall_over()
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())
    with pytest.raises(UserError, match="disk is full"), Saver(tmp_path, 2) as saver:
        saver.save(Training(), state_at(1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "expected a mapping, found list"),
        ("{}", "metric is None"),
        ('{"metric": "m", "value": 1, "step": "1"}', "step is '1'"),
    ],
)
def test_a_damaged_best_json_is_said_and_loses_no_checkpoint(alone, tmp_path, capsys, text, words):
    with Saver(tmp_path, 1) as saver:
        for step in (1, 2, 3):
            saver.save(Training(), state_at(step), {"metric": "m", "value": 1.0} if step == 1 else None)
            saver.finish()
            (tmp_path / "best.json").write_text(text)
    assert steps_of(tmp_path) == [1, 2, 3]
    said = capsys.readouterr()
    assert "best.json is damaged (" in said.out
    assert words in said.out
    assert find_model(tmp_path)[1] == tmp_path / "step-0000003"
    assert "best.json is damaged" in capsys.readouterr().err


def test_what_cannot_be_resumed_counts_for_none_that_are_kept(alone, tmp_path):
    engine = Training()
    with Saver(tmp_path, 2) as saver:
        for step in (1, 2, 3, 4):
            saver.save(engine, state_at(step))
            saver.finish()
            if step == 2:
                (tmp_path / "step-0000002/state.json").unlink()
    assert steps_of(tmp_path) == [2, 3, 4]
    assert [s.step for s in all_saved(tmp_path) if s.damage() is None] == [3, 4]
