"""What is written can be read by whom the umask allows, as any other file: weights, checkpoints, data, reports."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_prep.cli import main as data_prep
from PIL import Image
from stage_trainer import DualEncoder
from stage_trainer.checkpoint.save import write
from stage_trainer.files import write_whole
from text_tower import MaskedLM, TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig


@pytest.fixture(params=[0o022, 0o002, 0o077], ids="{:03o}".format)
def mask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def surprises(folder: Path, mask: int) -> dict[str, str]:
    """Files and folders whose mode is not what the umask gives a new one."""
    found = {}
    paths = [folder, *folder.rglob("*")]
    assert any(path.is_file() for path in paths)
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~mask:
            found[str(path.relative_to(folder))] = f"{mode:o}"
    return found


@pytest.fixture
def model(drawn_corpus) -> DualEncoder:
    text = TextTowerConfig(
        vocab_size=386, width=32, layers=1, heads=2, mlp_width=64, lora_rank=2, lora_alpha=2.0, adapters=("a",)
    )
    tower = TextTower(text, Tokenizer.from_file(drawn_corpus / "tokenizer.model"))
    return DualEncoder(tower, VisionTower(VisionTowerConfig(resolution=16, patch=8, width=32, layers=1, heads=2)))


def test_a_model_follows_the_umask(model, mask, tmp_path):
    (tmp_path / "out").mkdir()
    model.save_pretrained(tmp_path / "out/export")
    for layout in ("peft", "remote-code"):
        model.text.save_pretrained(tmp_path / "out" / layout, layout=layout)
    model.vision.save_pretrained(tmp_path / "out/vision")
    model.vision.save_pretrained(tmp_path / "out/vision")  # in place of what is there
    plain = TextTower(TextTowerConfig(vocab_size=386, width=32, layers=1, heads=2, mlp_width=64))
    MaskedLM(plain).save_pretrained(tmp_path / "out/masked-lm")
    assert surprises(tmp_path / "out", mask) == {}


def test_a_checkpoint_follows_the_umask(model, mask, tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", model, {"text.x|step": torch.zeros(1)}, {"step": 3})
    write_whole(tmp_path / "out/report.json", "{}\n")
    assert surprises(tmp_path / "out", mask) == {}


def test_data_sets_follow_the_umask(mask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(f"photos/{number}.jpg")
    rows = [f"{number}.jpg,picture {number} of four" for number in range(4)]
    Path("photos/captions.csv").write_text("\n".join(["file,caption", *rows]))
    Path("out").mkdir()
    for command in (
        "import images photos --name photos --language en --out out/data",
        "import images photos --name photos --language en --out out/one --workers 1",
        "dedup out/data/image-short/photos --name clean --out out/data",
        "inspect out/data --out out/look.html",
        "captions plan out/ledger.sqlite out/data/image-short/photos --model m --images 2",
        "corpus out/corpus --drawn",
    ):
        assert data_prep(command.split()) == 0, command
    assert surprises(tmp_path / "out", mask) == {}
