"""A projector after the text tower is in the formats that have a place for it, and other libraries give its vectors."""

import json
import re
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder

KINDS = {"linear": {}, "mlp": {"projector_hidden": 40}}
APPLES = ["a red apple", "ein roter Apfel"]


@pytest.fixture(scope="module")
def make(make_model):
    """A model whose text tower is 48 wide, projected to the image tower's 32."""
    return lambda kind, **more: make_model(
        text={"width": 48, "projector": 32, **KINDS[kind], **more}, vision={"crop_pct": 1.0}
    )


def export(model, save, folder, form, *options):
    if not (folder / "run").exists():
        save(folder / "run/stage1", model)
    return main(["export", str(folder / "run/stage1"), str(folder / form), f"--format={form}", *options])


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_vectors_with_the_projector(
    kind, make, save, tmp_path, sentences, elsewhere, exported, capsys
):
    model, short = make(kind), [text.strip() for text in sentences if text]
    for form in ("trilith", "common", "open-clip"):
        assert export(model, save, tmp_path, form) == 0
    assert "for open_clip alone" in capsys.readouterr().out
    assert "stage_trainer" not in (tmp_path / "open-clip/README.md").read_text()
    expected = model.encode_text(short)
    for form in ("trilith", "common"):
        there = DualEncoder.from_pretrained(tmp_path / form)
        assert there.text.config.adapters == (model.text.config.adapters if form == "trilith" else ())
        np.testing.assert_allclose(there.encode_text(short), expected, atol=1e-6)
    (tmp_path / "texts.json").write_text(json.dumps(short))
    shutil.copy(exported.parent / "photo.jpg", tmp_path / "photo.jpg")
    card = (tmp_path / "common/README.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    by_card = [next(code for code in codes if word in code) for word in ("AutoTokenizer", "pipeline")]
    found = elsewhere(
        f"""
import json, open_clip, torch
from sentence_transformers import SentenceTransformer
texts = json.load(open("texts.json"))
for folder in ("common", "common/text"):
    model = SentenceTransformer(folder, device="cpu")
    assert model.get_embedding_dimension() == 32
    out[folder.replace("/", " ")] = model.encode(texts)
    out[folder.replace("/", " ") + " cut"] = model.encode(texts, truncate_dim=16, normalize_embeddings=True)
name = {f"local-dir:{tmp_path}/open-clip"!r}
model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
with torch.no_grad():
    out["open_clip"] = model.encode_text(tokenizer(texts), normalize=True)
{by_card[0]}out["transformers"] = text
{by_card[1]}out["pipeline"] = text
""",
        tmp_path,
        "sentencepiece",
    )
    apples = model.encode_text(APPLES)
    wanted = {"transformers": apples, "pipeline": apples[:1]}
    for name, rows in found.items():
        cut = model.encode_text(short, truncate_dim=16) if name.endswith("cut") else expected
        np.testing.assert_allclose(rows, wanted.get(name, cut), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_has_the_projector(kind, make, save, tmp_path):
    model = make(kind)
    assert export(model, save, tmp_path, "onnx", "--dtype=float32") == 0
    graph = onnxruntime.InferenceSession(tmp_path / "onnx/onnx/text_model.onnx")
    ids = torch.randint(4, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    (found,) = graph.run(["text_embeddings"], {"input_ids": ids.numpy()})
    with torch.inference_mode():
        expected = model.text.padded()(ids).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_layout_without_a_place_for_it_refuses_it_by_name(make, save, tmp_path, capsys):
    model = make("linear")
    assert export(model, save, tmp_path, "jina-clip") == 2
    assert "the text tower has a projector, for which jina-clip-v2's layout has no place" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert export(make("linear", projector_hidden=8), save, tmp_path, "open-clip") == 2
    said = capsys.readouterr().err
    assert (
        "the text tower's projector has 8 hidden units, and open_clip's the mean of its inputs and outputs, 40" in said
    )
