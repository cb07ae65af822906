"""The model of the drawn quickstart goes through every format, and the library that it is for gives its vectors."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.retrieval import Pool
from vision_tower import load_image

pytestmark = pytest.mark.full
RECIPE = Path(__file__).parents[3] / "launch/recipes/drawn.yaml"
INPUTS = """
import json
from PIL import Image
texts = json.load(open("texts.json"))
images = [Image.open(f"images/{number:03}.png") for number in range(len(texts))]
"""
APPLES = ["a red apple", "ein roter Apfel"]  # of the cards
FARTHEST = {"": 1e-4, "_fp16": 0.005, "_int8": 0.1, "_q4": 0.3}  # a number of a vector of length one


class Trained(NamedTuple):
    """A folder with `run/stage3`, `texts.json`, `images/` and `photo.jpg`; the model, and its vectors of them."""

    folder: Path
    model: DualEncoder
    texts: list[str]
    text: np.ndarray
    image: np.ndarray


def tool(folder: Path, *words: object) -> str:
    program, *rest = map(str, words)
    command = [str(Path(sys.executable).with_name(program)), *rest]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """What `bash launch/quickstart.sh --drawn` trains."""
    folder = tmp_path_factory.mktemp("quickstart")
    tool(folder, "data-prep", "corpus", "corpus", "--drawn")
    here = ["output=run", "corpus=corpus", "model.tokenizer=corpus/tokenizer.model"]
    for stage in (1, 2, 3):
        tool(folder, "stage-trainer", "train", "--recipe", RECIPE, "--stage", stage, *here)
    pool = Pool.open(folder / "corpus/validation/image-short/drawn")
    texts = [text for captions in pool.texts.values() for _, text in captions][:20]
    (folder / "images").mkdir()
    for number, content in enumerate(pool.images[:20]):
        load_image(content).save(folder / f"images/{number:03}.png")
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    with Image.open(folder / "images/000.png") as picture:
        picture.resize((48, 48)).save(folder / "photo.jpg", quality=100)
    model = DualEncoder.from_pretrained(next((folder / "run/stage3").glob("step-*/model")))
    images = sorted((folder / "images").iterdir())
    return Trained(folder, model, texts, model.encode_text(texts), model.encode_image(images))


@pytest.fixture(scope="module")
def export(trained):
    """Exports it as a user does, into a folder that is named after the format."""

    def export(form: str, *options: str) -> Path:
        out = trained.folder / form
        if not out.exists():
            tool(trained.folder, "stage-trainer", "export", "run/stage3", form, "--format", form, *options)
        return out

    return export


def examples(folder: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max())


def test_the_common_directory_in_sentence_transformers_transformers_and_timm(trained, export, elsewhere):
    blocks = examples(export("common"))
    code = f"{INPUTS}apples = {APPLES!r}\n"
    code += """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("common", device="cpu")
out["dim"] = model.get_embedding_dimension()
out["text"], out["image"] = (model.encode(each, normalize_embeddings=True) for each in (texts, images))
"""
    (of_texts,), (of_images,), (timms,) = (
        [each for each in blocks if word in each] for word in ("AutoTokenizer", "AutoImageProcessor", "import timm")
    )
    code += f"{of_texts}out['transformers'] = text\n{of_images}out['transformers_image'] = image\n"
    found = elsewhere(f"{code}{timms}out['timm'] = image\n", trained.folder)
    assert found["dim"] == 64
    assert off(found["text"], trained.text) < 1e-6
    assert off(found["image"], trained.image) < 1e-6
    assert off(found["transformers"], trained.model.encode_text(APPLES)) < 1e-6
    photo = trained.model.encode_image([trained.folder / "photo.jpg"])
    assert max(off(found[name], photo) for name in ("transformers_image", "timm")) < 1e-6


def test_jina_clips_directory_by_the_published_arithmetic(trained, export):
    """The published code is on the hub alone, so its names and arithmetic are written out in these tests."""
    published = runpy.run_path(str(Path(__file__).parents[1] / "jina_clip/conftest.py"))["Published"]
    theirs = published(export("jina-clip", "--dtype", "float32"))
    images = [Image.open(path) for path in sorted((trained.folder / "images").iterdir())]
    assert off(theirs.encode_text(trained.texts).numpy(), trained.text) < 1e-5
    assert off(theirs.encode_image(images).numpy(), trained.image) < 1e-5


def test_open_clips_directory_in_open_clip(trained, export, elsewhere):
    (code,) = [each for each in examples(export("open-clip")) if "import open_clip" in each]
    code = INPUTS + code.replace('["a red apple", "ein roter Apfel"]', "texts")
    code += """
with torch.no_grad():
    out["image"] = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
out["text"], out["scale"] = text, model.logit_scale.item()
"""
    found = elsewhere(code, trained.folder)
    assert off(found["text"], trained.text) < 2e-6
    assert off(found["image"], trained.image) < 2e-6
    assert found["scale"] == pytest.approx(trained.model.logit_scale.item())


@pytest.mark.parametrize("bits", FARTHEST)
def test_each_precision_of_the_graphs_in_onnxruntime(trained, export, elsewhere, bits):
    out = export("onnx")
    tower = trained.model.vision
    pixels = np.stack([tower.normalize(tower.preprocess(path)) for path in sorted(trained.folder.glob("images/*"))])
    np.savez(trained.folder / "pixels.npz", pixels=pixels)
    code = f"""
import json, numpy, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file("onnx/tokenizer.json")
tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
ids = numpy.array([each.ids for each in tokenizer.encode_batch(json.load(open("texts.json")))])
inputs = {{"input_ids": ids, "pixel_values": numpy.load("pixels.npz")["pixels"]}}
for graph in ("text_model", "vision_model", "model"):
    session = onnxruntime.InferenceSession(f"onnx/onnx/{{graph}}{bits}.onnx")
    wanted = [each.name for each in session.get_outputs() if each.name.startswith("l2norm")]
    given = {{each.name: inputs[each.name] for each in session.get_inputs()}}
    for name, vectors in zip(wanted, session.run(wanted, given)):
        out[f"{{graph}} {{name}}"] = vectors
"""
    found = elsewhere(code, trained.folder, "torch", "transformers")
    assert len(list((out / "onnx").glob("*.onnx"))) == 12
    assert len(found) == 4
    for name, vectors in found.items():
        assert off(vectors, trained.text if "text" in name.split()[1] else trained.image) < FARTHEST[bits], name


def test_the_graphs_in_transformers_js(trained, export, node):
    out = export("onnx")
    (code,) = examples(out, "js")
    place = node / "quickstart"
    shutil.copytree(out, place / "onnx")
    shutil.copy(trained.folder / "photo.jpg", place)
    (place / "script.mjs").write_text(code)
    done = subprocess.run(["node", "script.mjs"], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    photo = trained.model.encode_image([trained.folder / "photo.jpg"])
    found = np.array(json.loads(done.stdout.strip().splitlines()[-1]))
    assert off(found, trained.model.encode_text(APPLES) @ photo.T) < 0.02  # a JPEG, decoded by another library


@pytest.mark.parametrize("form", ["run/stage3", "common", "trilith", "jina-clip", "open-clip"])
def test_encode_takes_each_directory_with_weights(trained, export, form):
    if "/" not in form:
        export(form, *(["--dtype", "float32"] if form == "jina-clip" else []))
    name = form.replace("/", "-")
    tool(trained.folder, "stage-trainer", "encode", form, "texts.txt", "images", "--out", f"{name}.npy")
    found = np.load(trained.folder / f"{name}.npy")
    assert off(found, np.concatenate([trained.text, trained.image])) < 1e-6
    assert len((trained.folder / f"{name}.ids.jsonl").read_text().splitlines()) == 40
