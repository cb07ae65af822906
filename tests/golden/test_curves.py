"""Training steps give the numbers that they gave before: see curves.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import curves

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
    found, differences = json.loads(out.read_text()), list[str]()
    for name in names:
        curve, same = curves.recorded(name)
        differences += curves.differences({name: curve}, found, same_machine=same)
    assert differences == []


def test_a_resumed_run_is_the_straight_one():
    for ranks in ("", ", two ranks"):
        assert curves.recorded(f"two resolutions, resumed{ranks}") == curves.recorded(f"two resolutions{ranks}")
