"""What TensorBoard shows of a stage that several processes trained, one after the other."""

import time

import pytest
from stage_trainer.run.monitor import Monitor, Shown
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
