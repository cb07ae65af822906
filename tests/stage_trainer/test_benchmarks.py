"""Every benchmark runs in a small size; those beside other trainers check there that all compute the same loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "packages" / "stage-trainer" / "benchmarks"


@pytest.fixture(scope="module")
def drawn_corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "corpus"
    command = Path(sys.executable).with_name("data-prep")
    subprocess.run([command, "corpus", str(out), "--drawn"], check=True, capture_output=True)
    return out


SMALL = ("image_text", "loader", "text_pairs", "memory", "v1_beside_v2")


@pytest.mark.full
def test_orders_are_compared_in_a_small_size(tmp_path):
    results = tmp_path / "results.json"
    script = [sys.executable, str(FOLDER / "lanes.py"), "--small", "--results", str(results)]
    run = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(results.read_text())["results"]
    assert {"cost", "lanes: 64", "open_clip"} <= set(found)
    assert found["lanes: 64"]["shards in a batch"] == 64


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_benchmarks_run_in_a_small_size(name, drawn_corpus, tmp_path):
    results = tmp_path / "results.json"
    script = [sys.executable, str(FOLDER / f"{name}.py"), "--small", "--corpus", str(drawn_corpus)]
    run = subprocess.run([*script, "--results", str(results)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    content = json.loads(results.read_text())
    assert set(content) == {"machine", "settings", "results"}
    if name == "memory":
        # What grows with the batch are the embeddings, their gradients and a copy of either; the rest is the chunk's.
        growth = content["results"]["growth"]
        assert growth["allocated_bytes"] < 1.6 * growth["embedding_bytes"]


@pytest.mark.full
def test_equal_time_sets_one_model_beside_both_specialists_and_keeps_what_it_measured(drawn_corpus, tmp_path):
    results = tmp_path / "results.json"
    where = ["--corpus", str(drawn_corpus), "--out", str(tmp_path / "kept"), "--results", str(results)]
    script = [sys.executable, str(FOLDER / "equal_time.py"), "--small", *where]
    first = subprocess.run(script, capture_output=True, text=True, timeout=1200)
    assert first.returncode == 0, first.stderr[-3000:]
    found = json.loads(results.read_text())["results"]
    assert set(found["chosen"]) == {"open_clip", "sentence-transformers", "ours"}
    measured = found["measured"]["2"]
    assert all(steps > 0 for of in measured["steps"].values() for steps in of)
    beside = {metric: set(of) - {"ours", "difference"} for metric, of in measured.items() if metric != "steps"}
    assert beside == {
        "drawn text→image": {"open_clip"},
        "drawn image→text": {"open_clip"},
        "drawn other→English": {"sentence-transformers"},
    }
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 6  # each chose by one training and was measured on another
    again = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(results.read_text())["results"] == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == kept
