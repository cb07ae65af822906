"""Every benchmark runs in a small size, and the losses that it sets side by side are the same loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "packages" / "contrastive-losses" / "benchmarks"
SMALL = {
    "cpu": ["--rows", "256", "--dims", "16", "64", "--repeats", "1"],
    "memory": ["--rows", "256", "512", "--dims", "16", "64"],
    "exchange": ["--ranks", "2", "--pairs", "256", "--dims", "16", "64"],
}


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_benchmarks_run_in_a_small_size(name, tmp_path):
    results = tmp_path / "results.json"
    script = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name], "--results", str(results)]
    run = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    content = json.loads(results.read_text())
    assert set(content) == {"machine", "settings", "results"}
    if name == "cpu":
        losses = [value["loss"] for value in content["results"].values()]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("name", ["cpu", "memory", "exchange"])
def test_the_results_file_holds_the_figures_of_the_readme(name):
    """The README's tables are these files; a change of one without the other is noticed."""
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    results = json.loads((FOLDER / "results" / f"{name}.json").read_text())["results"]
    if name == "cpu":
        for value in results.values():
            assert f"| {value['seconds']:.2f} s | {value['time_ratio']:.1f} |" in readme
            assert f"| {value['peak_bytes'] / 2**20:.0f} MiB | {value['memory_ratio']:.1f} |" in readme
    elif name == "exchange":
        for value in results["measured"]:
            figures = [
                f"{f['seconds']:.2f} s, {f['peak_bytes'] / 2**20:.0f} MiB" for f in (value["gather"], value["ring"])
            ]
            assert f"| {value['pairs']:,} | {' | '.join(figures)} |" in readme
        for value in results["counted"]:
            held, sent = value["held"].values(), value["sent"].values()
            figures = [*(f"{of / 1e6:,.0f}" for of in held), *(f"{of / 1e9:.2f}" for of in sent)]
            assert f"| {value['pairs']:,} | {value['ranks']} | {' | '.join(figures)} |" in readme
    else:
        for value in results:
            assert f"| {value['rows']:,} | {value['peak_bytes']['contrastive_losses'] / 2**20:.0f} MiB |" in readme
