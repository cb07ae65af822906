"""Which checkpoints of a stage stay, and which one it goes on from."""

import json

import pytest
import torch
from stage_trainer.errors import UserError
from stage_trainer.run import checkpoint
from stage_trainer.run.saver import Saver
from torch import nn


class Weights(nn.Linear):
    """Stands for a model: it writes its weights into a directory."""

    def save_pretrained(self, path):
        path.mkdir()
        torch.save(self.state_dict(), path / "weights.pt")


class Engine:
    """What a saver asks of an engine."""

    def __init__(self):
        self.model, self.shell = Weights(2, 2), Weights(2, 2, device="meta")

    def optimizer_state(self):
        yield "weight|step", torch.tensor(3.0)

    def copy_of_weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def steps(directory):
    return sorted(int(path.name[5:]) for path in directory.glob("step-*"))


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, 2, 6, 10])
def test_the_newest_stay_and_the_best_one_beside_them(alone, tmp_path, keep, best):
    """At every moment: after each save, not only at the end; a change of resolution saves out of turn."""
    saved = [2, 4, 5, 6, 8, 10]
    with Saver(tmp_path / "stage1", keep) as saver:
        for number, step in enumerate(saved):
            saver.save(step, Engine(), {"step": step}, {"metric": "m", "value": 1.0} if step == best else None)
            saver.finish()
            so_far = saved[: number + 1]
            of_note = {best} & set(so_far)
            assert steps(tmp_path / "stage1") == sorted(set(so_far[-keep:]) | of_note), step
    newest = checkpoint.newest_sound(tmp_path / "stage1")
    assert newest.step == 10
    assert newest.optimizer() == {"weight|step": torch.tensor(3.0)}


def test_the_best_one_makes_room_for_a_better_one(alone, tmp_path):
    with Saver(tmp_path / "stage1", 1) as saver:
        for step in (1, 2, 3, 4, 5):
            saver.save(step, Engine(), {}, {"metric": "m", "value": float(step)} if step in (1, 3) else None)
            saver.finish()
    assert steps(tmp_path / "stage1") == [3, 5]
    assert json.loads((tmp_path / "stage1/best.json").read_text()) == {"metric": "m", "value": 3.0, "step": 3}


def test_a_damaged_checkpoint_that_is_newer_is_passed_over_and_takes_no_others_place(alone, tmp_path, capsys):
    """Before the run is back at its step, it is not one of the newest; then it is kept aside, under another name."""
    directory = tmp_path / "stage1"
    with Saver(directory, 2) as saver:
        for step in (2, 4, 6):
            saver.save(step, Engine(), {})
            saver.finish()
        damaged = directory / "step-0000006/optimizer.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
        assert checkpoint.newest_sound(directory).step == 4
        assert "going on from step 4" in capsys.readouterr().out
        saver.save(5, Engine(), {})
        saver.finish()
        assert steps(directory) == [4, 5, 6]
        saver.save(6, Engine(), {})
        saver.finish()
    assert checkpoint.newest_sound(directory).step == 6
    assert {p.name for p in directory.glob("step-*")} >= {"step-0000005", "step-0000006"}
    assert damaged.parent.exists()
    assert len(list(directory.glob("step-0000006.*"))) == 1


def test_nothing_but_damaged_checkpoints_is_refused_with_the_reason_of_each(alone, tmp_path):
    with Saver(tmp_path / "stage1", 2) as saver:
        for step in (1, 2):
            saver.save(step, Engine(), {})
            saver.finish()
    (tmp_path / "stage1/step-0000001/model/weights.pt").unlink()
    (tmp_path / "stage1/step-0000002/model/weights.pt").write_bytes(b"other")
    with pytest.raises(UserError, match=r"weights.pt is not what was written; .*weights.pt is missing"):
        checkpoint.newest_sound(tmp_path / "stage1")
