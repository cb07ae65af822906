"""`bash tests/gpu.sh` runs, small, on a CPU; every part has its JSON, however it ends; no README has figures of a GPU
without results of one."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "tests" / "gpu"
CHEAP = ("versions", "fused_adamw")
NEED_CUDA = {
    "versions": ["gpu"],
    "fused_adamw": ["step on the CPU"],
    "loss": ["triton_tests"],
    "towers": [
        "text: bfloat16, varlen",
        "vision: bfloat16, flash-attn",
        "vision, packed: bfloat16, xformers",
        "uploads",
    ],
    "workers": ["begun before the workers"],
}
"""What cannot be had on a CPU, and has to say so."""


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("gpu_run", GPU / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_cpu(out: Path, *more: str) -> dict:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tests" / "gpu.sh"), "--cpu", "--out", str(out), *more]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads((out / "all.json").read_text())
    assert run.returncode == 0, run.stdout + json.dumps(found, indent=1)[-6000:]
    return found


def check(name: str, part: dict, out: Path) -> None:
    assert json.loads((out / f"{name}.json").read_text()) == part
    keys = ("part", "device", "limit_seconds", "status", "seconds", "problems", "results")
    assert tuple(part) == keys
    assert (part["part"], part["device"], part["status"], part["problems"]) == (name, "cpu", "ok", [])
    numbers = list(numbers_of(part["results"]))
    assert numbers or name == "workers"
    assert all(math.isfinite(number) for number in numbers)
    assert "not finite" not in json.dumps(part["results"])
    for what in NEED_CUDA.get(name, ()):
        assert part["results"][what] == "needs CUDA"


def numbers_of(value):
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_cheap_parts_run_small_on_a_cpu(tmp_path):
    found = on_cpu(tmp_path, "--only", ",".join(CHEAP))
    assert tuple(found) == CHEAP
    for name, part in found.items():
        check(name, part, tmp_path)


@pytest.mark.full
def test_all_parts_run_small_on_a_cpu(tmp_path, runner):
    found = on_cpu(tmp_path)
    assert tuple(found) == tuple(runner.PARTS)
    for name, part in found.items():
        check(name, part, tmp_path)
    losses = [each["loss"] for name, each in found["loss"]["results"]["losses"].items() if isinstance(each, dict)]
    assert len(losses) >= 3
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-2)  # bfloat16, by different ways
    for tower in ("vision", "text"):
        for what in ("float32, weights cast in each pass", "float32, weights cast once", "16 bits, weights cast once"):
            assert found["towers"]["results"][f"{tower}: residual in {what}"]["seconds"] > 0
    for zero in (0, 1):
        assert found["engine"]["results"][f"zero {zero}: resume"]["same_bits"]
        assert found["engine"]["results"][f"zero {zero}: one step"]["synchronisations"] == "needs CUDA"
    steps = found["step"]["results"]["steps"]
    assert len(steps) == 8
    assert all(each["seconds"] > 0 and each["planner"]["predicted_peak_bytes"] > 0 for each in steps.values())
    assert all(each["peak_bytes"] == each["mfu"] == "needs CUDA" for each in steps.values())


PARTS = {
    "dies": "import os, signal; write('running'); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "import time; write('running'); time.sleep(600)",
    "ends": "raise SystemExit(3)",
    "fails": "write('failed', ['off by 3']); raise SystemExit(1)",
    "works": "write('ok')",
}
WRITE = """
import json, sys
def write(status, problems=()):
    content = {"status": status, "problems": list(problems), "results": {"first": 1.5}}
    open(sys.argv[1], "w").write(json.dumps(content))
"""


def test_a_part_that_dies_hangs_or_fails_says_so_and_the_next_one_goes_on(tmp_path, runner, monkeypatch, capsys):
    parts = tmp_path / "parts"
    parts.mkdir()
    for name, program in PARTS.items():
        (parts / f"{name}.py").write_text(WRITE + program + "\n")
    monkeypatch.setattr(runner, "HERE", parts)
    monkeypatch.setattr(runner, "PARTS", dict.fromkeys(PARTS, 60) | {"hangs": 3})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--out", str(out), "--only", ",".join(PARTS)])
    assert runner.main() == 1
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS}
    assert found == json.loads((out / "all.json").read_text())
    assert {name: part["status"] for name, part in found.items()} == {
        "dies": "died: Segmentation fault",
        "hangs": "out of time",
        "ends": "ended with 3",
        "fails": "failed",
        "works": "ok",
    }
    assert all(found[name]["results"] == {"first": 1.5} for name in ("dies", "hangs", "fails", "works"))
    assert "off by 3" in capsys.readouterr().out


def test_a_figure_that_fails_is_a_problem_and_the_next_one_is_measured(tmp_path, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(GPU))
    from report import Report

    report = Report(tmp_path / "part.json", torch.device("cpu"))
    cases = {"absent": ImportError("no x"), "large": torch.OutOfMemoryError("x"), "broken": RuntimeError("x\ny")}

    def fail(error):
        raise error

    for name, error in cases.items():
        report.note(name, report.tried(name, lambda error=error: fail(error)))
    report.note("good", report.tried("good", lambda: {"seconds": 1.0, "rate": math.inf}))
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["results"] == {
        "absent": "not installed: no x",
        "large": "out of memory",
        "broken": "failed: RuntimeError: x\ny",
        "good": {"seconds": 1.0, "rate": "not finite: inf"},
    }
    assert found["problems"] == ["broken: RuntimeError: x\ny"]


def test_a_part_for_which_no_time_is_left_says_so(tmp_path, runner):
    part = runner.run_part("versions", 0.5, False, tmp_path)
    assert (part["status"], part["results"]) == ("no time left", {})


def test_all_parts_but_the_last_have_their_limits_within_nine_minutes(runner):
    *others, last = runner.PARTS.values()
    assert sum(others) + 30 <= runner.ALL_SECONDS < 9 * 60 > last
    assert {path.stem for path in GPU.glob("*.py")} - {"run", "report", "shapes", "drawn"} == set(runner.PARTS)


def test_no_readme_has_figures_of_a_gpu_without_results_of_one():
    """And none says that there are none once there are: then their tables come from these."""
    readmes = sorted((ROOT / "packages").glob("*/README.md"))
    said = [path for path in readmes if "Not yet measured on a GPU" in path.read_text(encoding="utf-8")]
    assert said == ([] if list((GPU / "results").glob("*.json")) else readmes)
