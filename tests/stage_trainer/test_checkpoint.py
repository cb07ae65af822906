"""Checkpoints in one process: what is written, verified, found again, kept. Whole runs: tests/integration."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from stage_trainer.checkpoint import save as checkpoint
from stage_trainer.checkpoint.load import all_saved, compatible, latest_valid
from stage_trainer.checkpoint.state import Best, RunState
from stage_trainer.commands.common import find_model
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.tasks.contrastive import set_resolution
from vision_tower import resample_position_table

from .conftest import make_model


@pytest.fixture
def write(tmp_path):
    def execute(step, seed=0, folder="stage1", **state):
        optimizer = {"logit_scale|exp_avg": torch.tensor([float(step)])}
        checkpoint.write(tmp_path / folder, make_model(seed), optimizer, {"step": step, **state})
        return tmp_path / folder / f"step-{step:07d}"

    return execute


def test_a_checkpoint_is_a_model_its_optimizers_state_and_what_was_said_of_it(write):
    path = write(12, settings={"a": [1, 2]})
    (saved,) = all_saved(path.parent)
    assert (saved.path, saved.step, saved.damage()) == (path, 12, None)
    assert saved.state()["settings"] == {"a": [1, 2]}
    assert saved.optimizer() == {"logit_scale|exp_avg": torch.tensor([12.0])}
    listed = set(saved.state()["files"])
    assert listed == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"state.json"}
    back = DualEncoder.from_pretrained(saved.model)
    torch.testing.assert_close(back.state_dict(), make_model().state_dict(), rtol=0, atol=0)


def other_bytes(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model/vision/config.json", other_bytes, "model/vision/config.json is not what was written"),
        ("optimizer.safetensors", other_bytes, "optimizer.safetensors is not what was written"),
        ("model/config.json", os.remove, "model/config.json is missing"),
        ("state.json", lambda path: path.write_text("{"), "no readable state.json"),
        ("state.json", lambda path: path.write_text("{}"), "files"),
        ("state.json", lambda path: path.write_text("[]"), "expected a mapping, found list"),
        ("state.json", lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        ("state.json", lambda path: path.write_text('{"step": "1", "files": {}}'), "it lacks 'step' or 'files'"),
        (
            "state.json",
            lambda path: path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7")),
            "not what was written",
        ),
        ("state.json", os.remove, "no readable state.json"),
    ],
)
def test_any_file_that_is_not_as_it_was_written_is_named(write, name, change, words):
    path = write(1, seconds=0.5)
    change(path / name)
    (saved,) = all_saved(path.parent)
    assert words in saved.damage()


def test_checkpoints_are_found_oldest_first_and_other_folders_are_none(write, tmp_path):
    assert all_saved(tmp_path / "none") == []
    for step in (100, 20, 3):
        write(step)
    write(10_000_000)
    for other in ("step-0000005.damaged-1", ".step-0000006.partial", "step-12", "xstep-0000008"):
        (tmp_path / "stage1" / other).mkdir()
    for other in ("step-12", "xstep-0000008", "step-0000005.damaged-1"):
        (tmp_path / "stage1" / other / "state.json").write_text("{}")
    assert [saved.step for saved in all_saved(tmp_path / "stage1")] == [3, 20, 100, 10_000_000]


def without_hash(path):
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    (path / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def test_a_checkpoint_of_a_release_that_hashed_no_state_is_read(alone, write):
    path = write(3, settings={"a": 1})
    without_hash(path)
    saved = latest_valid(path.parent)
    assert (saved.step, saved.state()["settings"]) == (3, {"a": 1})


def test_a_checkpoint_without_its_state_is_named_not_passed_over(alone, write, capsys):
    first, second = write(1), write(2)
    (second / "state.json").unlink()
    assert latest_valid(first.parent).step == 1
    assert f"{second} is damaged: {second} has no readable state.json" in capsys.readouterr().out
    shutil.rmtree(first)
    with pytest.raises(UserError, match="step-0000002 has no readable state.json"):
        latest_valid(first.parent)


def test_a_checkpoint_under_the_name_of_another_step_is_named_not_taken(alone, write, capsys):
    first, second = write(1), write(2)
    renamed = second.rename(second.with_name("step-0000009"))
    assert latest_valid(first.parent).step == 1
    said = capsys.readouterr().out
    assert f"{renamed} is damaged: it is of step 2, so its folder was renamed; name it step-0000002 again" in said
    shutil.rmtree(first)
    with pytest.raises(UserError, match="it is of step 2"):
        latest_valid(first.parent)


@pytest.mark.parametrize("name", ["step-2", "step-0000002.copy", "best", "step-2x"])
def test_a_folder_that_looks_like_a_checkpoint_is_named(alone, write, capsys, name):
    first, second = write(1), write(2)
    renamed = second.rename(second.with_name(name))
    for other in ("step-0000007.damaged-1", ".step-0000008.partial", "samples"):
        (first.parent / other).mkdir()
    assert latest_valid(first.parent).step == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{renamed} looks like a checkpoint, but its name is not that of one; it is of step 2: name")
    shutil.rmtree(first)
    with pytest.raises(UserError, match="name it step-0000002, or move it away.*--start-over"):
        latest_valid(first.parent)
    (renamed / "state.json").unlink()
    if name.startswith("step-"):
        with pytest.raises(UserError, match="it has no readable state.json: move it away"):
            latest_valid(first.parent)


def test_a_checkpoint_of_any_name_is_a_model(write):
    path = write(4)
    copy = path.rename(path.parent / "mine")
    assert find_model(copy) == (copy / "model", copy)


def test_the_latest_valid_one_is_taken_and_damaged_ones_are_said(alone, write, tmp_path, capsys):
    assert latest_valid(tmp_path / "stage1") is None
    paths = [write(step) for step in (1, 2, 3)]
    assert latest_valid(tmp_path / "stage1").step == 3
    assert capsys.readouterr().out == ""
    for path in paths[1:]:
        other_bytes(path / "optimizer.safetensors")
    assert latest_valid(tmp_path / "stage1").step == 1
    said = capsys.readouterr().out
    for path in paths[1:]:
        assert f"{path} is damaged: optimizer.safetensors is not what was written; going on from step 1" in said
    other_bytes(paths[0] / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"step-0000003 is damaged.*step-0000001 is damaged.*move them away"):
        latest_valid(tmp_path / "stage1")
    assert all(path.is_dir() for path in paths), "what is damaged is left to be looked at"


def test_a_models_digest_is_of_its_weights_and_settings_alone(write, tmp_path):
    first = all_saved(write(1).parent)[0]
    shutil.copytree(tmp_path / "stage1", tmp_path / "moved")
    assert all_saved(tmp_path / "moved")[0].model_digest() == first.model_digest()
    write(2, folder="later")  # another step, other moments, the same model
    write(1, seed=1, folder="other")
    assert all_saved(tmp_path / "later")[0].model_digest() == first.model_digest()
    assert all_saved(tmp_path / "other")[0].model_digest() != first.model_digest()


def test_a_damaged_checkpoint_of_the_same_step_is_moved_aside(write):
    for _ in range(2):
        other_bytes(write(4) / "optimizer.safetensors")
    path = write(4)
    assert all_saved(path.parent)[0].damage() is None
    names = {p.name for p in path.parent.iterdir() if not p.name.startswith(".")}
    assert names == {"step-0000004", "step-0000004.damaged-1", "step-0000004.damaged-2"}


def test_moments_follow_the_position_table_to_another_resolution():
    model = make_model(resolution=24)
    moment = torch.randn(1, 10, 16)
    optimizer = {
        "vision.pos_embed|exp_avg": moment, "vision.pos_embed|step": torch.tensor(7.0),
        "vision.pos_embed_other|exp_avg": moment, "text.weight|exp_avg": moment,
    }  # fmt: skip
    set_resolution(model, 40, optimizer)
    assert model.vision.config.resolution == 40
    assert model.vision.pos_embed.shape == (1, 26, 16)
    expected = resample_position_table(moment, (3, 3), (5, 5))
    torch.testing.assert_close(optimizer.pop("vision.pos_embed|exp_avg"), expected)
    assert optimizer == {
        "vision.pos_embed|step": torch.tensor(7.0), "vision.pos_embed_other|exp_avg": moment,
        "text.weight|exp_avg": moment,
    }  # fmt: skip
    set_resolution(model, 24)
    assert model.vision.pos_embed.shape == (1, 10, 16)


def test_settings_and_data_that_differ_are_named_and_the_same_ones_pass(tmp_path):
    saved = {"settings": {"a": [1, 2], "b": 1, "gone": 0}, "data": {"x": "1", "y": "2"}}
    compatible(saved, RunState({"a": (1, 2), "b": 1, "gone": 0}, {"x": "1", "y": "2"}, {}), tmp_path)
    newer = {"settings": {**saved["settings"], "weights": ()}, "data": saved["data"]}  # a default of this release
    compatible(newer, RunState({"a": (1, 2), "b": 1, "gone": 0, "weights": ()}, {"x": "1", "y": "2"}, {}), tmp_path)
    now = RunState({"a": (1, 3), "b": 1, "new": None}, {"x": "1", "y": "3", "z": "4"}, {})
    with pytest.raises(UserError) as caught:
        compatible(saved, now, tmp_path)
    said = str(caught.value)
    for words in (
        "a was [1, 2] and is now [1, 3]", "gone was 0 and is now 'absent'", "y was '2' and is now '3'",
        "z was 'absent' and is now '4'",
    ):  # fmt: skip
        assert words in said
    assert "b was" not in said
    assert "x was" not in said


def test_run_state_comes_back_as_it_was_written_but_for_what_this_process_is():
    saved = RunState(
        {"a": (1, 2)}, {"x": "1"}, {"torch": "old"}, 3.5, 7, 2, Best(metric="m", value=1.0), True, {"s": 3}
    )
    written = json.loads(json.dumps(saved.state_dict()))
    back = RunState({"a": (1, 2)}, {"x": "1"}, {"torch": "new"})
    back.load_state_dict(written)
    assert back == dataclasses.replace(saved, versions={"torch": "new"})
    back.load_state_dict({"step": 4})  # of an earlier release
    assert back == RunState({"a": (1, 2)}, {"x": "1"}, {"torch": "new"}, step=4)
