"""What goes wrong in real runs, provoked: gradients that are not finite, ranks that fail, die or hang, slow disks."""

import math
import re
import signal
import sys
import time

import pytest
from ports import free_port

from .conftest import started, until

QUICK = ("steps=8", "warmup_steps=2", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]")

PRELUDE = """
import os, sys, time
from stage_trainer.cli import launch
from stage_trainer.tasks.contrastive import ContrastiveTask
rank = int(os.environ.get("RANK", 0))
steps = iter(range(10**6))
forward_backward = ContrastiveTask.forward_backward
def tampered(*arguments):
    step = next(steps)
    {body}
    return forward_backward(*arguments)
ContrastiveTask.forward_backward = tampered
launch(stage=1)
"""


@pytest.fixture
def launch_tampered(tmp_path, launcher):
    """Starts stage 1 on the drawn corpus, with some lines that run before each step."""

    def start(body: str, *settings: str, ranks: int = 2):
        script = tmp_path / "tampered.py"
        script.write_text(PRELUDE.format(body=body))
        words = launcher(script, ranks, *QUICK, *settings)
        if ranks == 1:
            words = [sys.executable, *words[words.index(str(script)) :]]
        return started(words, tmp_path)

    return start


def ended(process) -> tuple[int, str]:
    process.wait(timeout=550)
    output = process.stdout.read()
    # The launcher's own lines come and go beside those of the ranks.
    lines = [line for line in output.splitlines() if "launch.py" not in line and "signal_handler" not in line]
    return process.returncode, "\n".join(lines).strip()


NAN_AT_3 = """
    if step == 3:
        losses = arguments[1].objective.losses
        def lost(*a, **o):
            arguments[1].objective.losses = losses
            return {task: (loss * float("nan"), stats) for task, (loss, stats) in losses(*a, **o).items()}
        arguments[1].objective.losses = lost
"""


@pytest.mark.parametrize("zero", [0, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2, 3))])
def test_a_step_that_is_not_finite_is_skipped_and_counted(launch_tampered, scalars, tmp_path, zero):
    options = ("optimizer.name=adamw", f"deepspeed={{zero_optimization: {{stage: {zero}}}}}")
    code, output = ended(launch_tampered(NAN_AT_3, *options, ranks=2 if zero else 1))
    assert code == 0, output
    assert "step 3 is skipped: a gradient is not finite" in output
    assert ("parameters, the first" in output) == (zero == 0)
    skipped = scalars("run/stage1", "trouble/skipped_steps")
    assert skipped == {step: float(step > 3) for step in range(8) if step != 3}
    # The model of step 3 is that of step 4: what follows is what a run without that step's update does.
    losses = scalars("run/stage1", "loss/text")
    assert all(0 < value < 100 for value in losses.values())


def test_steps_that_stay_not_finite_end_the_run_with_a_diagnosis(launch_tampered, tmp_path):
    body = NAN_AT_3.replace("step == 3", "step >= 3")
    code, output = ended(launch_tampered(body, "max_skipped=3", "checkpoint.every=2", ranks=1))
    assert code != 0
    assert output.count("3 steps in a row had a loss or gradient that is not finite, the last one step 5") == 1
    assert re.search(r"parameters, the first \w+", output)
    assert "Traceback" not in output
    assert [p.name for p in (tmp_path / "run/stage1").glob("step-*")] != []


def test_a_rank_that_fails_takes_the_other_down_and_its_traceback_is_last(launch_tampered):
    body = "if rank == 1 and step == 3: raise RuntimeError('the disk bay is on fire')"
    process = launch_tampered(body, "max_tokens=128")  # none is cut, of which the other rank might still say so
    began = time.monotonic()
    code, output = ended(process)
    assert code != 0
    assert output.count("Traceback") == 1, output
    assert output.splitlines()[-1] == "RuntimeError: the disk bay is on fire"
    assert "rank 1 failed:" in output
    assert time.monotonic() - began < 300  # with everything that comes before the third step, on a busy machine


@pytest.mark.full
def test_a_message_for_the_user_is_shown_once(launch_tampered):
    body = (
        "if step == 3:\n        from stage_trainer.errors import UserError\n        raise UserError('no more samples')"
    )
    code, output = ended(launch_tampered(body))
    assert code != 0
    assert output.count("stage-trainer: no more samples") == 1
    assert "Traceback" not in output


@pytest.mark.full
def test_a_rank_that_is_killed_takes_the_other_down(launch_tampered):
    process = launch_tampered(
        "if rank == 1 and step == 3:\n        import signal\n        os.kill(os.getpid(), signal.SIGKILL)"
    )
    code, output = ended(process)
    assert code != 0
    assert "Traceback" not in output, output


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_rank_that_is_stuck_while_its_heart_beats_ends_the_run_with_one_message(launch_tampered, ranks):
    code, output = ended(
        launch_tampered(f"if rank == {ranks - 1} and step == 3: time.sleep(100_000)", "limits.step=15", ranks=ranks)
    )
    assert code != 0
    assert output.count("raise limits.step if it was not") == 1, output
    assert f"rank {ranks - 1} was in one step for more than 15 seconds" in output
    assert "Traceback" not in output


HEARTBEAT = """
import sys, time, torch, torch.distributed as dist
from stage_trainer.run.watchdog import Heartbeat
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
with Heartbeat(rank, 3, silence=3.0, interval=0.3):
    print("ready", flush=True)
    time.sleep(float(sys.argv[3]))
    if len(sys.argv) > 4:
        raise RuntimeError("trouble of its own")
print("done", flush=True)
"""


@pytest.fixture
def hearts(tmp_path):
    """Three ranks with heartbeats, each to live so many seconds and then, perhaps, to fail."""
    port, running = str(free_port()), []

    def start(*lives: tuple[str, ...]) -> list:
        for rank, life in enumerate(lives):
            running.append(started([sys.executable, "-c", HEARTBEAT, str(rank), port, *life], tmp_path))
        return running

    yield start
    for process in running:
        process.kill()


@pytest.mark.parametrize(("lost", "how"), [(0, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_ranks_without_a_launcher_end_when_one_is_lost(hearts, lost, how):
    """As on several machines: nobody but the heartbeat sees that a rank is gone, or hangs."""
    ranks = hearts(*[("1000",)] * 3)
    for process in ranks:
        until(lambda process=process: process.stdout.readline() == "ready\n", process)
    ranks[lost].send_signal(how)
    for rank, process in enumerate(ranks):
        if rank != lost:
            assert process.wait(timeout=300) == 1
            assert f"rank {rank} ends: rank {0 if rank else lost}" in process.stdout.read()


def test_a_rank_that_leaves_by_an_exception_is_missed(hearts):
    ranks = hearts(("1000",), ("1", "fails"), ("1000",))
    for process in ranks:
        process.wait(timeout=300)
    said = [process.stdout.read() for process in ranks]
    assert "trouble of its own" in said[1]
    assert "rank 0 ends: rank 1 has given no sign of life" in said[0]
    assert "rank 2 ends: rank 0" in said[2]


def test_ranks_that_end_in_order_are_not_missed(hearts):
    ranks = hearts(("5",), ("5",), ("1",))
    assert [process.wait(timeout=300) for process in ranks] == [0, 0, 0]
    assert [process.stdout.read().split() for process in ranks] == [["ready", "done"]] * 3


def test_steps_go_on_while_a_checkpoint_is_written(launch_tampered, tmp_path):
    body = """
    if step == 0:
        from stage_trainer.checkpoint import save as checkpoint
        write = checkpoint.write
        def slow(*a):
            time.sleep(3)
            print("written after", ContrastiveTask.now, flush=True)
            write(*a)
        checkpoint.write = slow
    ContrastiveTask.now = step
"""
    code, output = ended(launch_tampered(body, "checkpoint={every: 2, keep: 9}", ranks=1))
    assert code == 0, output
    first = int(re.search(r"written after (\d+)", output)[1])
    assert first > 1, "the checkpoint of two steps was on its way while later ones ran"
    assert sorted(p.name for p in (tmp_path / "run/stage1").glob("step-*")) == [f"step-{n:07d}" for n in (2, 4, 6, 8)]


def test_the_best_checkpoint_stays(train, tmp_path, scalars):
    metric = "validation_recall_at_5_drawn/text to image"
    done = train(
        1, *QUICK, "evaluation={every: 2, pools: [image-short/drawn, text-pairs/drawn]}", "lr={image: 0.3, text: 0.3}",
        f"checkpoint={{every: 0, keep: 1, best: '{metric}'}}", "warmup_steps=4",
    )  # fmt: skip
    import json

    best = json.loads((tmp_path / "run/stage1/best.json").read_text())
    assert best["metric"] == metric
    shown = {
        int(s): float(v)
        for s, v in re.findall(r"step (\d+): recall_at_5_drawn/text to image ([\d.]+)", done.stdout + done.stderr)
    }
    assert set(shown) == {2, 4, 6, 8}
    assert best["value"] == pytest.approx(max(shown.values()), abs=6e-4)
    kept = {int(p.name[5:]) for p in (tmp_path / "run/stage1").glob("step-*")}
    assert kept == {best["step"], 8}
    cosine = [0.15 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    rates = scalars("run/stage1", "learning_rate_adamw/image")
    assert [rates[step] for step in range(8)] == pytest.approx([0.075, 0.15, 0.225, 0.3, *cosine])


def test_a_best_of_another_name_is_refused_before_the_first_step(train, tmp_path):
    measured = "evaluation={every: 2, pools: [image-short/drawn]}"
    misspelt = "checkpoint.best=validation_recall_at_5_drawn/text_to_image"
    done = train(1, *QUICK, measured, misspelt, fails=True)
    assert done.returncode == 2
    assert "which nothing measures; did you mean 'validation_recall_at_5_drawn/text to image'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 2" not in done.stdout + done.stderr
