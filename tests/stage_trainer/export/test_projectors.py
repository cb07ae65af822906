"""Projectors after the towers are in the formats that have a place for them, and other libraries give their vectors."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from vision_tower import VisionTower

KINDS = {"linear": ({}, {}), "mlp": ({"projector_hidden": 40}, {"projector_hidden": 64})}
APPLES = ["a red apple", "ein roter Apfel"]


@pytest.fixture(scope="module")
def make(make_model):
    """A model whose towers are 48 and 24 wide, both projected to 32."""

    def make(kind, **more):
        of_texts, of_images = KINDS[kind]
        return make_model(
            text={"width": 48, "projector": 32, **of_texts, **more},
            vision={"width": 24, "projector": 32, "crop_pct": 1.0, **of_images},
        )

    return make


def export(model, save, folder, form, *options):
    if not (folder / "run").exists():
        save(folder / "run/stage1", model)
    return main(["export", str(folder / "run/stage1"), str(folder / form), f"--format={form}", *options])


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_vectors_with_the_projectors(kind, make, save, tmp_path, sentences, elsewhere, capsys):
    model, short = make(kind), [text.strip() for text in sentences if text]
    images = list(np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8))
    for form in ("trilith", "common", "open-clip"):
        assert export(model, save, tmp_path, form) == 0
    assert "for open_clip alone" in capsys.readouterr().out
    assert "stage_trainer" not in (tmp_path / "open-clip/README.md").read_text()
    expected, of_images = model.encode_text(short), model.encode_image(images)
    for form in ("trilith", "common"):
        there = DualEncoder.from_pretrained(tmp_path / form)
        assert there.text.config.adapters == (model.text.config.adapters if form == "trilith" else ())
        np.testing.assert_allclose(there.encode_text(short), expected, atol=1e-6)
        np.testing.assert_allclose(there.encode_image(images), of_images, atol=1e-6)
    (tmp_path / "texts.json").write_text(json.dumps(short))
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    Image.fromarray(images[0]).save(tmp_path / "photo.jpg", format="PNG")
    card = (tmp_path / "common/README.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    words = ("AutoTokenizer", "pipeline", "AutoImageProcessor", "import timm")
    by_card = [next(code for code in codes if word in code) for word in words]
    found = elsewhere(
        f"""
import json, open_clip, torch
from PIL import Image
from sentence_transformers import SentenceTransformer
texts = json.load(open("texts.json"))
images = [Image.open(f"{{i}}.png") for i in range(3)]
for folder in ("common", "common/text"):
    model = SentenceTransformer(folder, device="cpu")
    assert model.get_embedding_dimension() == 32
    out[folder.replace("/", " ")] = model.encode(texts)
    out[folder.replace("/", " ") + " cut"] = model.encode(texts, truncate_dim=16, normalize_embeddings=True)
name = {f"local-dir:{tmp_path}/open-clip"!r}
(model, _, preprocess), tokenizer = open_clip.create_model_and_transforms(name), open_clip.get_tokenizer(name)
with torch.no_grad():
    out["open_clip"] = model.eval().encode_text(tokenizer(texts), normalize=True)
    out["open_clip image"] = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
for folder in ("common", "common/vision"):
    out[folder.replace("/", " ") + " image"] = SentenceTransformer(folder, device="cpu").encode(images)
{by_card[0]}out["transformers"] = text
{by_card[1]}out["pipeline"] = text
{by_card[2]}out["AutoImageProcessor"] = image
{by_card[3]}out["timm"] = image
""",
        tmp_path,
        "sentencepiece",
    )
    apples = model.encode_text(APPLES)
    wanted = {"transformers": apples, "pipeline": apples[:1]}
    wanted |= dict.fromkeys(("AutoImageProcessor", "timm"), of_images[:1])
    for name, rows in found.items():
        cut = model.encode_text(short, truncate_dim=16) if name.endswith("cut") else expected
        cut = of_images if name.endswith(" image") else cut
        np.testing.assert_allclose(rows, wanted.get(name, cut), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_has_the_projectors(kind, make, save, tmp_path):
    model = make(kind)
    assert export(model, save, tmp_path, "onnx", "--dtype=float32") == 0
    graph = onnxruntime.InferenceSession(tmp_path / "onnx/onnx/text_model.onnx")
    ids = torch.randint(4, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    (found,) = graph.run(["text_embeddings"], {"input_ids": ids.numpy()})
    with torch.inference_mode():
        expected = model.text.padded()(ids).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)  # those of images are in test_image_adapter.py


def test_a_layout_without_a_place_for_it_refuses_it_by_name(make, save, tmp_path, capsys):
    model = make("linear")
    assert export(model, save, tmp_path, "jina-clip") == 2
    assert "the image tower has a projector, for which jina-clip-v2's layout has no place" in capsys.readouterr().err
    model.vision = VisionTower(replace(model.vision.config, width=32, projector=0))
    shutil.rmtree(tmp_path / "run")
    assert export(model, save, tmp_path, "jina-clip") == 2
    assert "the text tower has a projector, for which jina-clip-v2's layout has no place" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert export(make("linear", projector_hidden=8), save, tmp_path, "open-clip") == 2
    said = capsys.readouterr().err
    assert (
        "the text tower's projector has 8 hidden units, and open_clip's the mean of its inputs and outputs, 40" in said
    )
