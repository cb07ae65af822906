"""Training steps give the numbers that they gave before: see curves.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import curves

GOLDEN = curves.recorded()
LONGER = sorted(set(curves.CURVES) - set(curves.EVERYDAY))


@pytest.mark.parametrize(
    "names",
    [pytest.param(curves.EVERYDAY, id="one rank"), pytest.param(LONGER, id="two ranks, ZeRO", marks=pytest.mark.full)],
)
def test_steps_give_the_recorded_numbers(names, tmp_path):
    out = tmp_path / "curves.json"
    corpus = curves.draw_corpus(tmp_path)
    subprocess.run(
        [sys.executable, curves.__file__, "train", "--corpus", corpus, "--folder", tmp_path, "--out", out, *names],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(out.read_text())
    differences = [
        line
        for name in names
        for there, curve in [GOLDEN[name]]
        for line in curves.differences({name: curve}, found, 0.0 if there == curves.machine() else 1e-5)
    ]
    assert differences == []


def test_a_resumed_run_is_the_straight_one():
    for ranks in ("", ", two ranks"):
        assert GOLDEN[f"two resolutions, resumed{ranks}"][1] == GOLDEN[f"two resolutions{ranks}"][1]
