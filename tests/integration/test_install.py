"""Each package installs into an empty environment with only what it needs; its README's first example runs there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = {
    "contrastive_losses": ["./packages/contrastive-losses"],
    "text_tower": ["./packages/text-tower"],
    "vision_tower": ["./packages/vision-tower"],
    "data_prep": ["./data_prep"],
    "stage_trainer": [
        "./packages/contrastive-losses",
        "./packages/text-tower",
        "./packages/vision-tower",
        "./data_prep",
        "./packages/stage-trainer",
    ],
}
FOREIGN = {
    "contrastive_losses": {"timm", "transformers", "deepspeed", "webdataset"},
    "text_tower": {"timm", "deepspeed", "webdataset"},
    "vision_tower": {"transformers", "deepspeed", "webdataset"},
    "data_prep": {"torch", "timm", "transformers", "deepspeed"},
    "stage_trainer": set(),
}


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_package_installs_alone_and_its_readme_example_runs(name, tmp_path):
    uv = shutil.which("uv") or pytest.fail("uv is missing; bash launch/environment.sh installs it")
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    subprocess.run(
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            "--constraint",
            ROOT / "launch/constraints.txt",
            *PLACES[name],
        ],
        cwd=ROOT,
        check=True,
    )
    readme = (ROOT / PLACES[name][-1] / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example, f"the README of {name} has no example in Python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", example[1]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [uv, "pip", "list", "--quiet", "--python", python], capture_output=True, text=True, check=True
    ).stdout
    installed = {line.split()[0] for line in listed.splitlines()[2:]}
    assert not installed & FOREIGN[name]
    assert f"trilith-{name.replace('_', '-')}" in installed
