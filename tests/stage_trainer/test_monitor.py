"""What TensorBoard shows of a stage that several processes trained, one after the other."""

import errno
import os
import sys
import time

import pytest
import torch
from PIL import Image
from stage_trainer.data.drawn import Corrupt
from stage_trainer.errors import UserError
from stage_trainer.run.ledger import Ledger
from stage_trainer.run.monitor import Monitor, Shown, open_sinks
from stage_trainer.tasks.task import Measured
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer


@pytest.mark.parametrize("clock", [[1000, 500], [1000, 500, 2000, 100], [1000, 1000, 1000], [5_000_000_000, 10, 20]])
def test_every_point_is_seen_whatever_the_clock_said_at_each_start(tmp_path, monkeypatch, clock):
    for number, now in enumerate(clock):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        monitor = Monitor(tmp_path, Shown(title="", start=2 * number, steps=100, every=1), active=True)
        with monitor:
            for step in range(2 * number, 2 * number + 3):  # the last one is lost: no checkpoint holds it
                monitor.scalar("loss", number + step / 10, step)
    monkeypatch.undo()
    events = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(tmp_path))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars(".", "loss")]
    last = len(clock) - 1
    expected = [(step, min(step // 2, last) + step / 10) for step in range(2 * len(clock) + 1)]
    assert points == [(step, pytest.approx(value)) for step, value in expected]
    assert len(list(tmp_path.iterdir())) == len(clock)


SHOWN = Shown(title="", start=0, steps=100, every=1)

MEASURED = Measured({}, (), Image.new("RGB", (2, 2)), torch.zeros(2, 4), [("a", "text"), ("b", "text")])


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_output_in_whose_place_a_file_stands_is_one_message(tmp_path):
    (tmp_path / "stage1").write_text("")
    with pytest.raises(UserError, match="could not write .*stage1: .*; free some space or name another place"):
        Monitor(tmp_path / "stage1", SHOWN, active=True)


@pytest.mark.parametrize("call", ["add_scalar", "close", "add_image", "add_embedding"])
def test_a_full_disk_that_tensorboard_meets_first_is_one_message(tmp_path, monkeypatch, call):
    monitor = Monitor(tmp_path, SHOWN, active=True)
    monkeypatch.setattr(monitor.writer, call, full)

    def go_on():
        with monitor:
            monitor.scalar("loss", 1.0, 0)
            monitor.measured(MEASURED, {}, 1)

    with pytest.raises(UserError, match=f"could not write {tmp_path}: No space left on device; free some space"):
        go_on()


def test_what_cannot_be_closed_does_not_hide_why_the_run_ends(tmp_path, monkeypatch):
    monitor = Monitor(tmp_path, SHOWN, active=True)
    monkeypatch.setattr(monitor.writer, "close", full)

    def fall_over():
        with monitor:
            raise UserError("the reason")

    with pytest.raises(UserError, match="^the reason$"):
        fall_over()


def test_a_full_disk_that_the_ledger_meets_is_one_message(tmp_path):
    ledger = Ledger(tmp_path / "gone/corrupt.jsonl", 1.0, active=True)
    with pytest.raises(UserError, match="could not write .*corrupt.jsonl: No such file or directory"):
        ledger.enter([Corrupt("shard", "key", "reason")], 1, 100)


SINKS = """
class Other:
    def __init__(self):
        pass

class Silent:
    def __init__(self, directory, settings):
        pass

class Positional(Silent):
    def scalar(self, value):
        pass
    def close(self):
        open("closed", "w").close()

class Remote(Silent):
    def scalar(self, name, value, step):
        pass
    def close(self):
        raise ConnectionError("no route")

number = 3
"""


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (SINKS, "Other", r"'a_sink:Other' raised TypeError: .*\(monitor.py, line \d+\); expected module:callable"),
        (SINKS, "Silent", "made a Silent without scalar or close; expected module:callable"),
        (SINKS, "number", "'a_sink:number' raised TypeError: 'int' object is not callable"),
        (SINKS, "none", "cannot be imported .*no attribute 'none'"),
        (SINKS, "Positional", "'a_sink:Positional' raised TypeError: .*scalar"),
        (SINKS, "Remote", r"'a_sink:Remote' raised ConnectionError: no route \(a_sink.py, line \d+\)"),
        ("class Sink(:", "Sink", "cannot be imported .*invalid syntax"),
        ("raise SystemError('odd')", "Sink", "cannot be imported .*odd"),
    ],
)
def test_a_sink_of_another_kind_is_one_message(tmp_path, monkeypatch, text, name, words):
    (tmp_path / "a_sink.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def go_on():
        sinks = open_sinks([f"a_sink:{name}"], tmp_path, {})
        with Monitor(tmp_path / "run", SHOWN, active=True, sinks=sinks) as monitor:
            monitor.scalar("loss", 1.0, 0)

    try:
        with pytest.raises(UserError, match=words):
            go_on()
    finally:
        sys.modules.pop("a_sink", None)
    assert (tmp_path / "closed").exists() == (name == "Positional"), "also a sink that failed is closed"


@pytest.mark.parametrize("predicted", [2.0, None])
def test_the_predicted_time_of_a_step_stands_beside_the_measured_one(tmp_path, monkeypatch, capsys, predicted):
    """From the second entry on: until the first, 100 seconds went by, in which the towers were compiled."""
    now = iter([0.0, 100.0, 100.0, 110.0, 110.0, 115.0, 115.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    shown = Shown(title="", start=3, steps=100, every=5, predicted=predicted)
    with Monitor(tmp_path, shown, active=True) as monitor:
        for step in range(3, 16):
            monitor.count(1, 1, 1, 0.0)
            if monitor.should_log(step):
                monitor.log(step, {}, {})
    said = capsys.readouterr().out
    events = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(tmp_path))
    events.Reload()
    tags = [tag for tag in events.Runs()["."]["scalars"] if "step_seconds" in tag]
    if predicted is None:
        assert (said, tags) == ("", [])
        return
    assert said == "a step takes 2 s; predicted were 2 s (+0%)\n", "once"
    measured = [(event.step, event.value) for event in events.Scalars(".", "speed/step_seconds")]
    assert measured == [(10, 2.0), (15, 1.0)]
    assert {event.value for event in events.Scalars(".", "speed/step_seconds_predicted")} == {2.0}
