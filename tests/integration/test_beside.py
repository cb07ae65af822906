"""Runs beside one another: not in one folder, and on one machine without harm."""

import os
import signal
import socket

import pytest

from .conftest import ROOT, started, until
from .test_stopping import BATCH, LONG, checkpoints

QUICK = ("steps=3", "warmup_steps=1", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]", BATCH)


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_holds_nobody_up(start, train, tmp_path):
    process = start(1, *LONG, BATCH, "workers=1")
    until(lambda: checkpoints(tmp_path), process)
    refused = train(1, *LONG, BATCH, fails=True, env={"SLURM_NTASKS": "2"})
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"the run's folder run is in use by process {process.pid} on {socket.gethostname()}" in refused.stderr
    assert "Slurm has started 2 tasks (SLURM_NTASKS)" in refused.stderr
    assert "loading PyTorch" not in refused.stdout
    anew = train(1, *LONG, BATCH, "--start-over", fails=True)
    assert "is in use by process" in anew.stderr
    assert "Slurm" not in anew.stderr
    assert [path.name for path in (tmp_path / "run").glob("stage1*")] == ["stage1"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = checkpoints(tmp_path)[-1]
    again = start(1, *LONG, BATCH)
    until(lambda: checkpoints(tmp_path)[-1] > reached + 2, again)
    again.terminate()
    assert again.wait() == 75
    assert not list((tmp_path / "run/stage1").glob("*.damaged-*"))
    assert not (tmp_path / "run/.lock").exists()


def test_two_runs_with_the_launchers_defaults_go_to_their_ends(tmp_path, launcher, scalars, train):
    """One through `deepspeed`, one through the launch file, at the same time: neither asks for a port."""
    words = launcher(ROOT / "launch/stage1.sh", 2, *QUICK, "optimizer.name=adamw")
    script = words.index(str(ROOT / "launch/stage1.sh"))
    by_hand = [*words[:3], *words[script:]]
    assert "--master_port" not in by_hand
    one = started([*by_hand, "output=one"], tmp_path)
    other = started(
        ["bash", words[script], *words[script + 1 :], "output=other"],
        tmp_path,
        DEEPSPEED_OPTIONS=" ".join(words[1:3]),
    )
    codes = [process.wait() for process in (one, other)]
    assert codes == [0, 0], one.stdout.read()[-2000:] + other.stdout.read()[-2000:]
    losses = [scalars(f"{name}/stage1", "loss/text") for name in ("one", "other")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert not list(tmp_path.glob("*/.port-*"))


@pytest.mark.full
def test_a_port_that_was_asked_for_and_is_taken_is_one_message(tmp_path, launcher):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = launcher(ROOT / "launch/stage1.sh", 2, *QUICK)
        words[words.index("--master_port") + 1] = port
        process = started(words, tmp_path)
        assert process.wait() == 2
    output = process.stdout.read()
    assert output.count(f"stage-trainer: port {port} is taken") == 1
    assert "--master_port N" in output
    assert "Traceback" not in output


def test_of_two_exports_into_one_place_the_second_is_refused(tmp_path):
    """While the first one writes; what it writes is whole, and what a killed one left is cleared away."""
    import sys

    program = """
import sys
from stage_trainer.files import whole_directory
with whole_directory("model") as folder:
    (folder / "weights").write_text("all of them")
    print("writing", flush=True)
    sys.stdin.readline()
"""
    import subprocess

    def export() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    first = export()
    assert first.stdout.readline() == "writing\n"
    _, error = export().communicate()
    assert f"model is being written: it is in use by process {first.pid}" in error
    first.kill()
    first.wait()
    second = export()
    assert second.stdout.readline() == "writing\n"
    second.communicate("\n")
    assert second.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/weights").read_text() == "all of them"
