"""transformers.js, of npm, opens an export in node and gives the model's vectors."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.cli import main
from text_tower import PackedTokens

CLASSES = """
import { AutoTokenizer, JinaCLIPTextModel, JinaCLIPVisionModel } from "@huggingface/transformers";
const found = {};
const list = (tensor) => tensor.tolist();
const cut = { padding: true, truncation: true, max_length: 512 };
const pictures = [await RawImage.read("exact.png")];
found.card = [list(text), list(image)];
found.texts = list((await model(await processor(TEXTS, null, cut))).l2norm_text_embeddings);
found.image = list((await model(await processor(null, pictures))).l2norm_image_embeddings);
const tokenizer = await AutoTokenizer.from_pretrained(FOLDER);
found.ids = TEXTS.map((each) => tokenizer.encode(each));
for (const dtype of ["fp32", "fp16", "int8", "q4"]) {
  const texts = await JinaCLIPTextModel.from_pretrained(FOLDER, { dtype });
  const images = await JinaCLIPVisionModel.from_pretrained(FOLDER, { dtype });
  found[dtype] = [
    list((await texts(tokenizer(TEXTS, cut))).l2norm_text_embeddings),
    list((await images(await processor(null, pictures))).l2norm_image_embeddings),
  ];
}
const { writeFileSync } = await import("node:fs");
writeFileSync("found.json", JSON.stringify(found));
"""
FAR = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.2, "q4": 0.7}


@pytest.mark.full
@pytest.mark.parametrize("vision", [{}, {"crop_pct": 1.0, "interpolation": "bicubic"}], ids=["clip", "jina"])
def test_transformers_js_opens_the_export_and_gives_the_models_vectors(node, make_model, save, vision, sentences):
    model = make_model(vision=vision)
    folder = Path(node) / "run"
    shutil.rmtree(folder, ignore_errors=True)
    save(folder / "stage1", model)
    assert main(["export", str(folder / "stage1"), str(folder / "model"), "--format", "onnx"]) == 0
    draw = np.random.default_rng(0)
    # A picture that no library has to resize: its shorter side is what the shorter side becomes.
    side = 54 if not vision else 48
    Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / "exact.png")
    Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 90)).save(folder / "photo.jpg")
    (code,) = re.findall(r"```js\n(.*?)```", (folder / "model/README.md").read_text(), re.DOTALL)
    texts = [each for each in sentences if each]
    said = f"const TEXTS = {json.dumps(texts)};\nconst FOLDER = 'model';\n"
    (folder / "script.mjs").write_text(code + said + CLASSES)
    done = subprocess.run(["node", "script.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    ids = model.text.tokenizer(texts)
    assert found["ids"] == ids
    assert max(map(len, ids)) > 512
    with torch.no_grad():  # it cuts a long text without keeping </s>, as the card says
        wanted = model.text(PackedTokens.from_lists([row[:512] for row in ids]))
    wanted, image = torch.nn.functional.normalize(wanted, dim=-1).numpy(), model.encode_image([folder / "exact.png"])

    def off(vectors, wanted) -> float:
        return float(np.abs(np.array(vectors) - wanted).max())

    assert off(found["texts"], wanted) < 1e-4
    assert off(found["image"], image) < 1e-4
    for dtype, bound in FAR.items():
        assert off(found[dtype][0], wanted) < bound, dtype
        assert off(found[dtype][1], image) < bound, dtype
    assert off(found["card"][0], model.encode_text(["a red apple", "ein roter Apfel"])) < 1e-4
    assert off(found["card"][1], model.encode_image([folder / "photo.jpg"])) < 0.2  # resized by another library
