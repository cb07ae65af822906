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


EXCHANGE = """
import torch
from peft import PeftModel
from text_tower import PackedTokens, TextTower, TextTowerConfig
from transformers import AutoModel

shape = dict(vocab_size=100, width=32, layers=2, heads=2, mlp_width=64)
tower = TextTower(TextTowerConfig(**shape, adapters=("a",), lora_rank=2, lora_alpha=2.0)).eval()
for parameter in tower.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
tower.save_pretrained("model", layout="peft")
theirs = PeftModel.from_pretrained(AutoModel.from_pretrained("model"), "model/a").eval()
ids = torch.tensor([[0, 17, 42, 2]])
with torch.no_grad():
    found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
    torch.testing.assert_close(tower(PackedTokens.from_lists(ids.tolist())), found, atol=1e-5, rtol=1e-5)
read = TextTower.from_pretrained("model", peft=None)
assert read.config == tower.config
"""


@pytest.mark.full
def test_the_extra_transformers_brings_what_models_are_exchanged_with(tmp_path):
    uv = shutil.which("uv") or pytest.fail("uv is missing; bash launch/environment.sh installs it")
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    command = [uv, "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "launch/constraints.txt"]
    subprocess.run([*command, "./packages/text-tower[transformers]"], cwd=ROOT, check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    code = [python, "-W", "ignore", "-c", EXCHANGE]
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
