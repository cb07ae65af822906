"""Fine-tuning as the README and the recipes' heads say it: from a folder of images and a table to figures."""

import csv
import json
import re
import shlex
from pathlib import Path

from data_prep.cli import main as data_prep
from PIL import Image, ImageDraw
from stage_trainer import DualEncoder
from stage_trainer.cli import main as stage_trainer
from stage_trainer.recipe.read import load
from text_tower import TextTower, TextTowerConfig, Tokenizer
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
    missing = run("stage-trainer", "report", "--recipe", recipe, fails=True).stderr
    command = shlex.split(missing.splitlines()[-1].partition(": ")[2])
    assert command == ["stage-trainer", "evaluate", "runs/finetune/stage1", "data"]
    run(*command)
    assert "mine (16 images)" in run("stage-trainer", "report", "--recipe", recipe).stdout


def quickstart_model(place: Path, tokenizer: Path) -> None:
    """A model of the quickstart's shape, untrained, with the drawn corpus' tokenizer."""
    shape = load(ROOT / "launch/recipes/laptop.yaml").recipe.model
    text = TextTowerConfig(**{**shape.text, "vocab_size": 386})
    vision = VisionTowerConfig(**shape.vision, resolution=42)
    DualEncoder(TextTower(text, Tokenizer.from_file(tokenizer)), VisionTower(vision)).save_pretrained(place)


def test_the_readme_leads_from_200_images_and_semicolons_to_figures_and_a_picture(
    run, tmp_path, drawn_corpus, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    nouns = ("Kreis", "Ball", "Punkt", "Fleck", "Mond")
    rows = [["Dateiname", "Beschreibung"]]
    for number in range(200):
        image = Image.new("RGB", (64, 48), (3 * number % 256, 80, 200 - number))
        ImageDraw.Draw(image).ellipse((4 + number % 20, 4, 30 + number % 20, 30), fill=COLORS[number % 8])
        image.save(tmp_path / f"photos/IMG_{number:04}.JPG")
        rows.append([f"IMG_{number:04}.JPG", f"Ein {nouns[number % 5]}, größer als {number}; Nr. {number}"])
    with (tmp_path / "photos/captions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)  # as Excel's "CSV UTF-8" in Europe
    (tmp_path / "runs/laptop").mkdir(parents=True)
    quickstart_model(tmp_path / "runs/laptop/model", drawn_corpus / "tokenizer.model")

    section = re.search(r"^## Fine-tuning$.*?^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section
    activate, imports, train, export, evaluate, search = map(shlex.split, section[1].splitlines())
    assert activate == ["source", ".venv/bin/activate"]
    assert data_prep(imports[1:]) == 0
    sizes = {
        split: json.loads((tmp_path / f"data/{split}/image-short/mine/manifest.json").read_text())["samples"]
        for split in ("train", "validation")
    }
    assert sum(sizes.values()) == 200
    assert 15 < sizes["validation"] < 70
    assert train[:3] == ["bash", "launch/stage1.sh", "--recipe"]  # which takes a port; here without it, and shorter
    here = ["steps=4", "evaluation.every=2", "checkpoint.every=2", "warmup_steps=1", "precision=fp32"]
    run("stage-trainer", "train", "--stage", 1, "--recipe", ROOT / train[3], *here)
    for command in (export, evaluate, search):  # in this process, which has loaded PyTorch already
        assert command[0] == "stage-trainer"
        assert not stage_trainer(command[1:])
    assert f"mine ({sizes['validation']} images)" in capsys.readouterr().out
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.getcolors(2**24) or []) > 10
