"""Checkpoints in one process: what is written, verified, found again, kept. Whole runs: tests/integration."""

import dataclasses
import errno
import json
import os
import shutil
import threading

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from stage_trainer.checkpoint import save as checkpoint
from stage_trainer.checkpoint.load import all_saved, compatible, latest_valid
from stage_trainer.checkpoint.save import Saver
from stage_trainer.checkpoint.state import Best, RunState
from stage_trainer.commands.common import find_model
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine.base import without_weights
from stage_trainer.errors import UserError
from stage_trainer.files import free_name, whole_directory, write_whole
from stage_trainer.tasks.contrastive import set_resolution
from text_tower import TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig, resample_position_table


def make_model(seed=0, resolution=24):
    torch.manual_seed(seed)
    text = TextTowerConfig(vocab_size=50, width=16, layers=1, heads=2, mlp_width=32)
    vision = VisionTowerConfig(resolution=resolution, patch=8, width=16, layers=1, heads=2, mlp_width=24)
    return DualEncoder(TextTower(text), VisionTower(vision))


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("it broke"), "could not write .*out: it broke; free some space"),
        (OSError(errno.EACCES, "Permission denied"), "could not write .*out: Permission denied; free some space"),
        (OSError("in words alone"), "could not write .*out: in words alone; free some space"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_message_whoever_says_it(tmp_path, error, words):
    def write_half():
        with whole_directory(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(UserError, match=words):
        write_half()
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_is_not_taken_over(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/old").write_text("x")
    with whole_directory(tmp_path / "out") as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_text_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "one")
    write_whole(tmp_path / "file", "zwölf")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "zwölf"

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="file: No space left on device"):
        write_whole(tmp_path / "file", "three")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "zwölf"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_free_name_is_the_first_that_nothing_has(tmp_path):
    assert free_name(tmp_path / "a", "old") == tmp_path / "a.old-1"
    for number in (1, 2, 4):
        (tmp_path / f"a.old-{number}").touch()
    assert free_name(tmp_path / "a", "old") == tmp_path / "a.old-3"
