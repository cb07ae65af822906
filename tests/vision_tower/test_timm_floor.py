"""No file of a directory runs code: not with the timm that is installed, and not with the oldest one that is allowed.

Run as a script it does what the tests do, with the timm that it finds: `python test_timm_floor.py FOLDER`.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from vision_tower import VisionTower, VisionTowerConfig

ROOT = Path(__file__).parents[2]
NAME = "eva02_large_patch14_clip_224"


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def hostile(folder: Path, mark: Path) -> list[Path]:
    """Directories of a good tower, each of which tells timm of a pickle in another way."""
    bad = folder / "bad.pth"
    bad.write_bytes(pickle.dumps({"state_dict": Touch(mark)}))
    tower = VisionTower(VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2))
    arguments = {k: v for k, v in tower.config.timm_arguments().items() if k != "num_classes"}
    inner = folder / "inner"
    tower.save_pretrained(inner)
    named = {"architecture": NAME, "num_classes": 0, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    told = {"file": str(bad), "url": bad.as_uri(), "custom_load": True, "source": "file", "input_size": [3, 32, 32]}
    configs = [
        {**named, "model_args": {**arguments, "checkpoint_path": str(bad)}},
        {**named, "model_args": {**arguments, "pretrained": True, "pretrained_cfg": told}},
        {**named, "model_args": {**arguments, "pretrained_cfg_overlay": told}},
        {**named, "model_args": {**arguments, "pretrained": True}, "pretrained_cfg": told},
        {**named, "model_args": arguments, "architecture": f"local-dir:{inner}"},
        {**named, "model_args": arguments, "architecture": "hf-hub:someone/something"},
        {**named, "model_args": {**arguments, "norm_layer": "os.system"}},
        {"architecture": NAME, "num_classes": 0, "checkpoint_path": str(bad), **told},
    ]
    (inner / "config.json").write_text(json.dumps(configs[0]))
    made = []
    for number, values in enumerate(configs):
        made.append(folder / f"timm{number}")
        tower.save_pretrained(made[-1])
        (made[-1] / "config.json").write_text(json.dumps(values))
    tower.save_pretrained(folder / "elsewhere")
    others = [f"local-dir:{inner}", f"local-dir:{folder / 'elsewhere'}", "hf-hub:someone/something"]
    for number, name in enumerate([*others, "vit_tiny_patch16_224"]):
        vision = {"timm_model_name": name, "timm_pool": "token", "timm_model_pretrained": True}
        made.append(folder / f"clip{number}")
        tower.save_pretrained(made[-1])
        (made[-1] / "config.json").unlink()
        (made[-1] / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    made.append(folder / "pickled")
    made[-1].mkdir()
    (made[-1] / "pytorch_model.bin").write_bytes(bad.read_bytes())
    return made


def attempt(folder: Path) -> None:
    mark = folder / "ran"
    directories = hostile(folder, mark)
    for directory in directories:
        with pytest.raises(ValueError, match=re.escape(str(directory))):
            VisionTower.from_pretrained(directory)
        assert not mark.exists(), directory
    good = folder / "good"
    VisionTower.from_pretrained(folder / "timm0" / "model.safetensors").save_pretrained(good)
    assert VisionTower.from_pretrained(good).config.width == 32
    values = json.loads((good / "config.json").read_text())
    timms = {key: values[key] for key in ("architecture", "num_classes", "model_args", "pretrained_cfg")}
    (good / "config.json").write_text(json.dumps(timms))
    assert VisionTower.from_pretrained(good).config.layers == 2, "without the arguments that are refused it loads"
    pickle.loads((folder / "bad.pth").read_bytes())
    assert mark.exists(), "this pickle runs code"


def test_no_file_of_a_directory_runs_code(tmp_path):
    attempt(tmp_path)


@pytest.fixture(scope="module")
def oldest_timm(tmp_path_factory):
    """Runs Python with the oldest timm that is allowed."""
    needs = (ROOT / "packages/vision-tower/pyproject.toml").read_text()
    oldest = re.search(r'"timm>=([\d.]+)"', needs)[1]
    environment = tmp_path_factory.mktemp("timm") / "env"
    python = environment / "bin/python"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, f"timm=={oldest}"], check=True)
    # Its own timm is found first; everything else is that of the environment that runs the tests.
    first = (
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r}); import runpy, sys, timm; "
        f"assert timm.__version__ == {oldest!r}, timm.__version__; "
    )

    def run(script: str) -> None:
        words = [python, "-c", first + script]
        done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr

    return run


@pytest.mark.full
def test_no_file_of_a_directory_runs_code_with_the_oldest_timm(tmp_path, oldest_timm):
    oldest_timm(f"sys.argv = [{__file__!r}, {str(tmp_path)!r}]; runpy.run_path({__file__!r}, run_name='__main__')")


@pytest.mark.full
def test_directories_are_read_and_refused_in_the_same_way_with_the_oldest_timm(oldest_timm):
    """What it lacks is refused in its own words."""
    tests = str(Path(__file__).with_name("test_timm_directories.py"))
    oldest_timm(f"import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {tests!r}]))")


if __name__ == "__main__":
    attempt(Path(sys.argv[1]))
