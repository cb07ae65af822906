"""The script that measures on a GPU runs, small, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "packages" / "text-tower" / "benchmarks"


@pytest.mark.full
def test_throughput_runs_in_a_small_size():
    results = FOLDER / "results" / "throughput-of-a-test.json"
    script = [sys.executable, str(FOLDER / "throughput.py"), "--small", "--repeats", "1", "--name", results.stem]
    try:
        run = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
        assert json.loads(results.read_text())
    finally:
        results.unlink(missing_ok=True)
