"""tests/chaos.py: it tells what survived from what did not, and a short run of it loses nothing."""

import os
import re
import subprocess
import sys

import pytest

from .conftest import ROOT

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from tests.chaos import FAULTS, Chaos
from tests.chaos_tasks import SIDES, Task

TOYS = {
    "whole": "touch out/begun; $HALT; rm out/begun; echo whole > out/result",
    "another result": "touch out/$$; $HALT; rm out/$$; echo whole > out/result",
    "no end": "test -e out/begun && sleep 1000; touch out/begun; $HALT; rm out/begun",
    "no success": "test -e out/begun && exit 2; touch out/begun; $HALT; rm out/begun",
    "a child is left": "if test -e out/begun; then sleep 1000 & fi; touch out/begun; $HALT; rm out/begun",
    "traceback": "test -e out/begun && echo 'Traceback (most recent call last):'; touch out/begun; $HALT",
}

def kill_in_the_middle(trial):
    trial.begin()
    trial.environment["HALT"] = "sleep 1000"
    process = trial.start()
    while not any(trial.out.iterdir()):
        time.sleep(0.01)
    trial.signal(process, signal.SIGKILL, "everything")
    trial.wait(process)
    del trial.environment["HALT"]

def toy(line):
    class Toy(Task):
        name, faults = "a toy", ("kill_in_the_middle",)
        def words(self):
            return ["bash", "-c", line]
    return Toy

FAULTS["kill_in_the_middle"] = kill_in_the_middle
for name, line in TOYS.items():
    SIDES["preparation"] = [toy(line)]
    chaos = Chaos(Path(sys.argv[1]) / name.replace(" ", "-"), seed=0, patience=1)
    print("FOUND", name, "|", *chaos.try_one("preparation", "kill_in_the_middle", 0), flush=True)
"""


def test_what_is_lost_hangs_or_prints_a_traceback_is_told_from_what_survives(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert dict(re.findall(r"FOUND (.*) \| (.*)", done.stdout)) == {
        "whole": "survived False",
        "another result": "lost False",
        "no end": "hung False",
        "no success": "lost False",
        "a child is left": "hung False",
        "traceback": "survived True",
    }, done.stdout


@pytest.mark.full
@pytest.mark.parametrize("side", ["training", "preparation"])
def test_a_minute_of_faults_loses_nothing(tmp_path, side):
    words = [sys.executable, ROOT / "tests/chaos.py", "--minutes", "1", "--seed", "1", "--against", side]
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*words, "--folder", tmp_path / "trials"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^all +(\d+)", done.stdout, re.MULTILINE)[1]) > 0, done.stdout
