"""finetune.yaml as its head says it: a folder of images and a table, to an exported model."""

import csv
import json
import shlex
from pathlib import Path

from PIL import Image, ImageDraw
from stage_trainer import DualEncoder
from text_tower import TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig

ROOT = Path(__file__).parents[2]
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


def photos(folder: Path) -> None:
    """Disks of eight colours at places of their own, with captions in English."""
    folder.mkdir()
    rows = {"train": [], "held-out": []}
    for number in range(64):
        color = COLORS[number % 8]
        image = Image.new("RGB", (60, 48), "grey")
        left, top = 4 + number % 24, 4 + number // 8
        ImageDraw.Draw(image).ellipse((left, top, left + 24, top + 24), fill=color)
        image.save(folder / f"{number}.png")
        rows["train" if number < 48 else "held-out"].append((f"{number}.png", f"a {color} disk, number {number}"))
    for name, entries in rows.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "caption"), *entries])


def test_a_folder_of_images_becomes_a_finetuned_model(run, tmp_path):
    photos(tmp_path / "photos")
    for split, table in (("train", "train"), ("validation", "held-out")):
        run("data-prep", "import", "images", "photos", "--table", f"photos/{table}.csv", "--name", "mine",
            "--language", "en", "--out", f"data/{split}")  # fmt: skip
    text = TextTowerConfig(vocab_size=386, width=64, layers=1, heads=2, mlp_width=256, max_length=128)
    vision = VisionTowerConfig(resolution=32, patch=8, width=64, layers=2, heads=2)
    DualEncoder(TextTower(text), VisionTower(vision)).save_pretrained(tmp_path / "published")

    ours = (
        "model.weights=published", "model.tokenizer={corpus}/tokenizer.model",
        "workers=0", "max_tokens=32", "steps=12", "batch.image_text=16",
        "resolution=[[0, 32]]", "loss.dims=[64, 32]", "evaluation.every=6", "checkpoint.every=6", "warmup_steps=2",
        "precision=fp32",
    )  # fmt: skip
    recipe = ROOT / "launch/recipes/finetune.yaml"
    done = run("stage-trainer", "train", "--recipe", recipe, "--stage", "1", *ours)
    assert "gradient caching: auto is none here" in done.stdout
    assert "recall_at_5_mine/text to image" in done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/finetune/stage1/best.json").read_text())["step"] in (6, 12)
    run("stage-trainer", "export", "runs/finetune/stage1", "my-model")
    # As the recipe's head has it, word for word.
    typed = [
        shlex.split(line.removeprefix("#"), comments=True)
        for line in recipe.read_text().splitlines()
        if line.startswith(("#   stage-trainer evaluate", "#   stage-trainer search"))
    ]
    assert [words[1] for words in typed] == ["evaluate", "search"]
    figures, search = (run(*words) for words in typed)
    assert "the validation split of data: image-short/mine" in figures.stderr
    assert "mine (16 images)" in figures.stdout
    assert "searching 16 images of the validation split of data" in search.stderr
    assert Image.open(tmp_path / "search.png").size[0] > 900
    missing = run("stage-trainer", "report", "--recipe", recipe, *ours, fails=True).stderr
    command = shlex.split(missing.splitlines()[-1].partition(": ")[2])
    assert command == ["stage-trainer", "evaluate", "runs/finetune/stage1", "data"]
    run(*command)
    assert "mine (16 images)" in run("stage-trainer", "report", "--recipe", recipe, *ours).stdout
