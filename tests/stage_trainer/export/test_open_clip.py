"""open_clip, as it is, opens an export in a process without our packages, and gets our vectors."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder

LOAD = """
import logging, open_clip, open_clip.hf_configs, torch
from PIL import Image
assert len(open_clip.hf_configs.arch_dict) == 5  # nothing is registered
NAME = {name!r}
model, _, preprocess = open_clip.create_model_and_transforms(NAME)
tokenizer = open_clip.get_tokenizer(NAME)
model.eval()
with torch.no_grad():
    out["text"] = model.encode_text(tokenizer(texts), normalize=True)
    out["image"] = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    out["scale"] = model.logit_scale.item()
    out["loss"] = model(torch.stack([preprocess(image) for image in images[:2]]), tokenizer(texts[:2]))[2].item()
"""


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vision={"crop_pct": 1.0})


@pytest.fixture(scope="module")
def folder(model, save, tmp_path_factory):
    """A folder with a checkpoint, its export and a photo."""
    folder = tmp_path_factory.mktemp("open_clip")
    save(folder / "run" / "stage1", model)
    assert main(["export", str(folder / "run" / "stage1"), str(folder / "model"), "--format", "open-clip"]) == 0
    draw = np.random.default_rng(2)
    for number, (width, height) in enumerate(((40, 40), (60, 40), (40, 71), (57, 54), (48, 48))):
        pixels = draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    shutil.copy(folder / "1.png", folder / "photo.jpg")
    return folder


def inputs(folder, sentences):
    """Where a script finds them, as `texts` and `images`; open_clip strips and mends texts before."""
    (folder / "texts.json").write_text(json.dumps([text.strip() for text in sentences if text]))
    return (
        "import json\nfrom PIL import Image\ntexts = json.load(open('texts.json'))\n"
        "images = [Image.open(f'{i}.png').convert('RGB') for i in range(5)]\n"
    )


def check(found, model, folder, sentences):
    expected = model.encode_text([text.strip() for text in sentences if text])
    assert np.abs(found["text"] - expected).max() < 2e-6
    expected = model.encode_image([folder / f"{number}.png" for number in range(5)])
    assert np.abs(found["image"] - expected).max() < 2e-6
    assert found["scale"] == pytest.approx(model.logit_scale.item())
    assert found["loss"] == pytest.approx(model.logit_scale.exp().item())


def test_open_clip_gets_our_vectors(folder, model, sentences, elsewhere, tmp_path, monkeypatch):
    card = (folder / "model" / "README.md").read_text()
    (example,) = [part.partition("```")[0] for part in card.split("```python\n")[1:] if "import open_clip" in part]
    # It says of itself where it is, so that it may be loaded from anywhere.
    load = LOAD.format(name=f"local-dir:{folder / 'model'}")
    moved = f"{inputs(folder, sentences)}import os\nos.chdir({str(tmp_path)!r})\n{load}os.chdir({str(folder)!r})\n"
    found = elsewhere(f"{moved}{example}out['by_card'] = text", folder, "sentencepiece")
    check(found, model, folder, sentences)
    apples = ["a red apple", "ein roter Apfel"]
    assert np.abs(found["by_card"] - model.encode_text(apples)).max() < 2e-6
    monkeypatch.chdir(folder)
    ours: dict[str, np.ndarray] = {}
    exec(card.split("```python\n")[1].partition("```")[0], ours)
    assert np.abs(ours["text"] - model.encode_text(apples, truncate_dim=16)).max() < 2e-6


def test_a_repository_of_a_hub_is_loaded_by_its_name(folder, model, sentences, elsewhere, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--a-model" / "snapshots" / ("a" * 40)
    words = ["--format", "open-clip", "--repository", "someone/a-model"]
    assert main(["export", str(folder / "run" / "stage1"), str(tmp_path / "out"), *words]) == 0
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "out", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    for file in folder.glob("*.png"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    code = inputs(tmp_path, sentences) + LOAD.format(name="hf-hub:someone/a-model")
    check(elsewhere(code, tmp_path), model, folder, sentences)
    # push sees to it that the names agree.
    assert main(["push", str(tmp_path / "out"), "someone/else"]) == 2


def test_what_open_clip_has_no_word_for_is_refused_by_name(make_model, tmp_path, capsys):
    cases = [
        ({"crop_pct": 0.875}, "crop_pct 0.875"),
        ({"crop_pct": 1.0, "crop_mode": "border"}, "crop_mode border"),
        ({"crop_pct": 1.0, "resolution": (48, 56)}, "crop_mode center to 48x56"),
        ({"crop_pct": 1.0, "interpolation": "lanczos"}, "interpolation lanczos"),
        ({"crop_pct": 1.0, "layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
    ]
    for number, (vision, message) in enumerate(cases):
        make_model(vision=vision).save_pretrained(tmp_path / str(number))
        assert main(["export", str(tmp_path / str(number)), str(tmp_path / "out"), "--format", "open-clip"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "open-clip", "--lora", "kept"], "open_clip has no adapters"),
        (["--repository", "a/b"], "--repository is for --format open-clip"),
        (["--format", "open-clip", "--repository", "name"], "--repository is 'name'; expected OWNER/NAME"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, capsys, words, message):
    assert main(["export", str(tmp_path / "no"), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_squashed_rectangle_keeps_its_shape(make_model, elsewhere, tmp_path, sentences):
    model = make_model(vision={"crop_pct": 1.0, "crop_mode": "squash", "resolution": (48, 64)}, adapters=())
    model.save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "model"), "--format", "open-clip"]) == 0
    model = DualEncoder.from_pretrained(tmp_path / "saved")
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (50 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    code = inputs(tmp_path, sentences[:2]) + LOAD.format(name="local-dir:model")
    check(elsewhere(code, tmp_path), model, tmp_path, sentences[:2])
