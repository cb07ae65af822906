"""tests/machines/run.py: several machines as network namespaces. Needs root and a few programs, and says so without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines.network import NEEDED

SCRIPT = Path(__file__).parents[1] / "machines/run.py"
MISSING = [name for name in NEEDED if shutil.which(name) is None]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=1500)


@pytest.mark.full
@pytest.mark.skipif(
    os.geteuid() != 0 or bool(MISSING), reason=f"needs root, and {', '.join(MISSING) or 'nothing else'}"
)
def test_two_machines_start_lose_power_and_go_on():
    done = run("--machines", "2", "--only", "hostfile,cut,return,lost-disk,clock")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("outcome passed") == 5


def test_a_trial_that_does_not_exist_is_refused_by_name():
    done = run("--only", "hostfile,flood")
    assert done.returncode == 2
    assert "no trial flood" in done.stderr
