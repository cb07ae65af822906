"""However a run is asked to stop, it saves and leaves with 75; what dies beside it is one message."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest

from .conftest import RECIPE, ROOT, command, started, until

LONG = (
    "steps=5000",
    "warmup_steps=2",
    "evaluation.every=0",
    "log_every=1",
    "resolution=[[0, 32]]",
    "checkpoint.every=2",
)
BATCH = "batch={image_text: 8, text: 8}"


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run/stage1").glob("step-*") if "." not in path.name)


def loader_workers(process: int) -> list[int]:
    """The processes that load data for another one, by the name that torch gives them."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "pt_data_worker\n"]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 1))])
def test_a_signal_to_the_process_group_with_workers_saves_and_leaves_no_process(start, train, tmp_path, number):
    process = start(1, *LONG, BATCH, "workers=2")
    until(lambda: checkpoints(tmp_path), process)
    workers = loader_workers(process.pid)
    assert len(workers) == 2
    os.killpg(process.pid, number)
    assert process.wait() == 75
    output = process.stdout.read()
    stopped = int(re.search(r"stopped after step (\d+) of 5000, as asked; the same command goes on", output)[1])
    assert checkpoints(tmp_path)[-1] == stopped
    assert "Traceback" not in output
    assert not [worker for worker in workers if alive(worker)]


def test_a_worker_that_is_killed_is_replaced_then_one_message_and_a_killed_run_leaves_none(start, tmp_path):
    process = start(1, *LONG, BATCH, "workers=2")
    until(lambda: checkpoints(tmp_path), process)
    before = loader_workers(process.pid)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: "the workers are started again, once" in Path(process.stdout.name).read_text(), process)
    first, second = until(lambda: len(new := set(loader_workers(process.pid)) - {*before}) == 2 and new, process)
    assert not any(map(alive, before))
    os.kill(first, signal.SIGKILL)
    assert process.wait() == 2
    message = process.stdout.read().splitlines()[-1]
    assert message.startswith(
        f"stage-trainer: a process that loads data (number {first}) was killed, most likely because"
    )
    assert "lower workers (now 2), cache_megabytes or the batch; the same command goes on" in message
    assert "Traceback" not in Path(process.stdout.name).read_text()
    assert not alive(second)

    process = start(1, *LONG, BATCH, "workers=2")
    until(lambda: "going on from step" in Path(process.stdout.name).read_text(), process)
    workers = until(lambda: loader_workers(process.pid), process)
    process.kill()
    process.wait()
    while any(alive(worker) for worker in workers):  # or this test never ends
        time.sleep(0.02)


MOMENTS = """
import dataclasses, os, signal, sys
from stage_trainer import trainer
from stage_trainer.checkpoint import save as checkpoint
from stage_trainer.cli import main
from stage_trainer.evaluation import retrieval
from stage_trainer.tasks.contrastive import ContrastiveTask

def ask():
    os.kill(os.getpid(), signal.SIGTERM)

def before(module, name, nth=1):
    "Asks for an end at the nth call of a function."
    function, calls = getattr(module, name), iter(range(1, 10**6))
    def tampered(*arguments, **options):
        if next(calls) == nth:
            ask()
        return function(*arguments, **options)
    setattr(module, name, tampered)
    return lambda: setattr(module, name, function)

class First:
    "Batches, of which the first one takes until the run is asked to end."
    def __init__(self, items): self.items, self.close = items, items.close
    def __next__(self):
        ask()
        return next(self.items)

def evaluation(*arguments):
    "Asks for an end before the third batch of a validation."
    validation = real(*arguments)
    def asked(last, before_batch):
        batches = iter(range(1, 10**6))
        def counted():
            if next(batches) == 3:
                ask()
            before_batch()
        return validation.run(last, counted)
    return dataclasses.replace(validation, run=asked)

words = ["train", "--stage", "1", *sys.argv[1:]]
batches, real, retrieval.BATCH = trainer.batches, ContrastiveTask.make_validation, 8
def say(moment, code):
    print("AT", moment, code, flush=True)

trainer.batches = lambda *a, **k: First(batches(*a, **k))
say("batch", main([*words, "output=batch"]))
trainer.batches = batches
back = before(checkpoint, "write")
say("save", main([*words, "output=save"]))
back()
ContrastiveTask.make_validation = evaluation
say("evaluation", main([*words, "output=evaluation"]))
say("evaluation", main([*words, "output=evaluation"]))
say("last", main([*words, "output=last", "steps=2"]))
ContrastiveTask.make_validation = real
for _ in range(2):
    say("last", main([*words, "output=last", "steps=2"]))
back = before(ContrastiveTask, "forward_backward", 2)
say("owed", main([*words, "output=owed"]))
back()
back = before(checkpoint, "write")
say("change", main([*words, "output=change", "resolution=[[0, 32], [2, 48]]"]))
back()
say("resolution", None)
back = before(trainer, "starting_point", 2)
main([*words, "output=resolution", "resolution=[[0, 32], [2, 48]]"])
"""


def test_at_every_moment_a_run_saves_and_what_it_owes_is_made_up_for(tmp_path, drawn_corpus, train, scalars):
    script = tmp_path / "moments.py"
    script.write_text(MOMENTS)
    settings = [
        "--recipe", str(RECIPE), f"corpus={drawn_corpus}", f"model.tokenizer={drawn_corpus}/tokenizer.model", BATCH,
        "steps=6", "warmup_steps=1", "log_every=1", "resolution=[[0, 32]]", "checkpoint.every=2",
        "evaluation={every: 2, pools: [image-short/drawn]}",
        "checkpoint.best=validation_recall_at_5_drawn/text to image",
    ]  # fmt: skip
    process = started([sys.executable, str(script), *settings], tmp_path)
    assert process.wait() == 75  # that of the last moment
    output = process.stdout.read()
    assert re.findall(r"AT (\w+) (\w+)", output) == [
        ("batch", "75"), ("save", "75"), ("evaluation", "75"), ("evaluation", "75"), ("last", "75"), ("last", "0"),
        ("last", "0"), ("owed", "75"), ("change", "75"), ("resolution", "None"),
    ]  # fmt: skip
    assert output.splitlines()[-1] == "stage-trainer: stopped, as asked, with nothing unsaved; the same command goes on"
    saved = {
        folder: sorted(int(path.name[5:]) for path in (tmp_path / folder / "stage1").glob("step-*"))[-1]
        for folder in ("batch", "save", "evaluation", "last", "owed", "resolution")
    }
    assert saved["batch"] == 1
    assert saved["save"] in (3, 4)
    assert [saved[folder] for folder in ("evaluation", "last", "owed", "resolution")] == [2] * 4
    tag = "validation_recall_at_5_drawn/text to image"
    assert tag not in scalars("evaluation/stage1")
    assert tag not in scalars("owed/stage1")
    assert set(scalars("last/stage1", tag)) == {1}
    assert json.loads((tmp_path / "last/stage1/best.json").read_text())["step"] == 2
    assert "stopped after step 2 of 2, as asked; the same command goes on from there" in output
    assert len(list((tmp_path / "last/stage1").glob("*tfevents*"))) == 2, "nothing is made up for twice"
    words = settings[2:]
    done = train(1, *words[2:], output="owed")
    assert "going on from step 2 of 6 (owed/stage1/step-0000002)" in done.stdout
    assert set(scalars("owed/stage1", tag)) == {1, 3, 5}


def ranks(words: list[str], folder: Path) -> list[subprocess.Popen]:
    """Two ranks without a launcher, as srun starts them."""
    return [started(words, folder, **rank) for rank in forks.of_ranks(2)]


@pytest.mark.full
@pytest.mark.parametrize("who", [(0, 1), (1,)])
def test_ranks_without_a_launcher_save_whoever_is_signalled(tmp_path, launcher, who):
    words = launcher(ROOT / "launch/stage1.sh", 2, *LONG, BATCH, "workers=1")
    words = [command("stage-trainer"), "train", "--stage", "1", *words[words.index("--recipe") :]]
    processes = ranks(words, tmp_path)
    until(lambda: checkpoints(tmp_path), processes[0])
    for rank in who:
        os.killpg(processes[rank].pid, signal.SIGTERM)
    assert [process.wait() for process in processes] == [75, 75]
    output = "".join(process.stdout.read() for process in processes)
    assert output.count("as asked; the same command goes on") == 1
    assert "Traceback" not in output


IN_EVALUATION = """
import dataclasses, os, signal, sys
from stage_trainer.cli import main
from stage_trainer.evaluation import retrieval
from stage_trainer.tasks.contrastive import ContrastiveTask

real, retrieval.BATCH = ContrastiveTask.make_validation, 4
def make_validation(*arguments):
    validation, batches = real(*arguments), iter(range(1, 10**6))
    def run(last, before_batch):
        def counted():
            if next(batches) == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            before_batch()
        return validation.run(last, counted)
    return dataclasses.replace(validation, run=run)
ContrastiveTask.make_validation = make_validation
sys.exit(main(["train", "--stage", "1", *sys.argv[1:]]))
"""


@pytest.mark.full
@pytest.mark.parametrize("zero", [0, 3])
def test_a_rank_that_is_asked_during_an_evaluation_ends_that_of_all(tmp_path, launcher, zero):
    settings = (
        *LONG, "checkpoint.every=0", "evaluation={every: 2, pools: [image-short/drawn]}", "optimizer.name=adamw",
        f"deepspeed={{zero_optimization: {{stage: {zero}}}}}",
    )  # fmt: skip
    words = launcher(ROOT / "launch/stage1.sh", 2, *settings, BATCH)
    processes = ranks([sys.executable, "-c", IN_EVALUATION, *words[words.index("--recipe") :]], tmp_path)
    assert [process.wait() for process in processes] == [75, 75]
    output = "".join(process.stdout.read() for process in processes)
    assert output.count("stopped after step 2 of 5000, as asked") == 1
    assert "Traceback" not in output
    assert checkpoints(tmp_path) == [2]
    assert json.loads((tmp_path / "run/stage1/step-0000002/state.json").read_text())["unmeasured"] is True


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGTERM, False),
        *(pytest.param(*way, marks=pytest.mark.full) for way in [(2, True), (15, True), (1, False)]),
    ],
)
def test_a_launch_file_gives_its_ranks_the_time_to_save_and_leaves_with_75(tmp_path, launcher, number, group):
    """Asked by a scheduler (TERM), at the terminal (INT to the group), by the end of a session (HUP)."""
    words = launcher(ROOT / "launch/stage1.sh", 2, *LONG, BATCH, "workers=1")
    options = words[1 : words.index(str(ROOT / "launch/stage1.sh"))]
    process = started(
        ["bash", str(ROOT / "launch/stage1.sh"), *words[words.index("--recipe") :]],
        tmp_path,
        DEEPSPEED_OPTIONS=" ".join(options[:2]),
    )
    until(lambda: checkpoints(tmp_path), process)
    (os.killpg if group else os.kill)(process.pid, number)
    assert process.wait() == 75
    output = process.stdout.read()
    stopped = int(re.search(r"stopped after step (\d+) of 5000, as asked", output)[1])
    assert checkpoints(tmp_path)[-1] == stopped
    assert output.count("as asked") == 1
    assert "Traceback" not in output
    assert "world_info" not in output, "the launcher's log"


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_whose_launcher_was_ended_alone_save_and_leave(tmp_path, launcher, number):
    process = started(launcher(ROOT / "launch/stage1.sh", 2, *LONG, BATCH), tmp_path)
    until(lambda: checkpoints(tmp_path), process)
    process.send_signal(number)
    process.wait()
    log = Path(process.stdout.name)
    while "as asked; the same command goes on" not in log.read_text():  # the ranks are nobody's now
        time.sleep(0.02)


@pytest.mark.full
def test_a_run_that_is_asked_to_stop_while_it_starts_leaves_with_75(start, tmp_path):
    process = start(1, *LONG)
    until(lambda: "loading PyTorch" in Path(process.stdout.name).read_text(), process)
    process.terminate()
    assert process.wait() == 75
    assert process.stdout.read().splitlines()[1:] == [
        "stage-trainer: stopped, as asked, with nothing unsaved; the same command goes on"
    ]
