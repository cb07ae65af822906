"""Other libraries open an export without our packages, and get our vectors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from text_tower import TextTower


def examples(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)


def example(card: Path, *words: str) -> str:
    """The card's only example that has these words."""
    (found,) = [code for code in examples(card) if all(word in code for word in words)]
    return found


def close(found: np.ndarray, expected: np.ndarray, bound: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < bound


def of_squares(model: DualEncoder, pictures, dims: int = 32) -> np.ndarray:
    """The vectors of the squares that transformers cuts out."""
    pixels = torch.stack([torch.from_numpy(np.array(picture.theirs)).permute(2, 0, 1) for picture in pictures])
    with torch.no_grad():
        vectors = model.vision(model.vision.normalize(pixels))[:, :dims]
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def stored(folder: Path, texts: list[str], pictures) -> str:
    """Puts inputs where a script finds them, as `texts` and `images`."""
    (folder / "texts.json").write_text(json.dumps(texts))
    for number, picture in enumerate(pictures):
        picture.image.save(folder / f"{number}.png")
    return (
        "import json\nfrom PIL import Image\ntexts = json.load(open('texts.json'))\n"
        f"images = [Image.open(f'{{i}}.png') for i in range({len(pictures)})]\n"
    )


def test_sentence_transformers_encodes_texts_and_pictures_of_any_mode(exported, model, sentences, pictures, elsewhere):
    code = (
        example(exported / "README.md", "sentence_transformers")
        + stored(exported.parent, sentences, pictures)
        + """
model = SentenceTransformer("model", device="cpu")
out["dim"], out["longest"] = model.get_embedding_dimension(), model.max_seq_length
out["modalities"] = sorted(map(str, model.modalities))
out["text"], out["query"] = model.encode(texts), model.encode_query(texts)
out["task"], out["document"] = model.encode(texts, prompt_name="retrieval.query"), model.encode_document(texts)
out["image"] = model.encode(images)
out["raw"] = model.encode(texts, truncate_dim=16)
out["cut"] = model.encode(texts, truncate_dim=16, normalize_embeddings=True)
out["cut_image"] = SentenceTransformer("model", truncate_dim=16).encode(images, normalize_embeddings=True)
out["alone"] = SentenceTransformer("model/text", device="cpu").encode(texts)
out["image_alone"] = SentenceTransformer("model/vision", device="cpu").encode(images)
model.save_pretrained("again")
model = SentenceTransformer("again", device="cpu")
out["again"], out["image_again"] = model.encode(texts), model.encode(images)
"""
    )
    found = elsewhere(code, exported.parent, "sentencepiece")
    assert (found["dim"], found["longest"], list(found["modalities"])) == (32, 512, ["image", "text"])
    text, cut = model.encode_text(sentences), model.encode_text(sentences, truncate_dim=16)
    close(found["text"], text)
    close(found["alone"], text)
    close(found["document"], text)
    for name in ("query", "task"):
        close(found[name], model.encode_text(sentences, task="retrieval.query"))
    image = of_squares(model, pictures)
    close(found["image"], image)
    close(found["image_alone"], image)
    close(found["again"], text)
    close(found["image_again"], image, 0.02)  # what it saves itself does not say that Pillow resizes
    close(found["cut"], cut)
    close(found["cut_image"], of_squares(model, pictures, 16))
    assert np.linalg.norm(found["raw"], axis=1).max() < 0.99  # which is why the card says normalize_embeddings


def test_the_crop_is_all_in_which_pictures_differ(model, pictures):
    """The bound that the card states: the same pixels, or a crop that begins one pixel earlier."""
    ours = model.encode_image([picture.image for picture in pictures])
    theirs = of_squares(model, pictures)
    same = np.abs(ours - theirs).max(1) < 1e-6
    surplus = [54 * max(p.image.size) // min(p.image.size) - 48 for p in pictures]
    assert list(same) == [pixels % 4 != 3 for pixels in surplus]
    assert 0 < same.sum() < len(same)


def test_transformers_misses_no_weight_and_gives_the_vectors(exported, model, sentences, pictures, elsewhere):
    card = exported / "README.md"
    texts, pipe, images = (
        example(card, *words) for words in (("AutoTokenizer",), ("pipeline",), ("AutoImageProcessor",))
    )
    code = (
        f"{stored(exported.parent, sentences, pictures)}{texts}out['text'] = text\n{pipe}out['pipe'] = text\n{images}"
    )
    code += """
out["photo"] = image
for folder in ("text", "vision"):
    model, said = AutoModel.from_pretrained(f"model/{folder}", output_loading_info=True)
    out[f"unfit_{folder}"] = sum(len(found) for found in said.values())
out["features"] = model.config.num_features
from transformers import AutoConfig
config = AutoConfig.from_pretrained("model/vision")
images = processor([Image.open(f"{i}.png") for i in range(8)], return_tensors="pt").pixel_values
out["images"] = torch.nn.functional.normalize(model.eval()(images).pooler_output, dim=-1).detach()
out["by_name"] = AutoImageProcessor.from_pretrained("model", subfolder="vision", backend="pil")(
    [Image.open(f"{i}.png") for i in range(8)], return_tensors="pt").pixel_values
assert type(processor).__name__.startswith("CLIPImageProcessor")
out["pixels"] = images
"""
    found = elsewhere(code, exported.parent, "sentence_transformers")
    apples = ["a red apple", "ein roter Apfel"]
    close(found["text"], model.encode_text(apples))
    close(found["pipe"], model.encode_text(apples[:1]))
    close(found["photo"], model.encode_image([exported.parent / "photo.jpg"]))
    close(found["images"], of_squares(model, pictures))
    assert np.array_equal(found["by_name"], found["pixels"])
    assert (found["unfit_text"], found["unfit_vision"], found["features"]) == (0, 0, 32)


def test_timm_takes_shape_preprocessing_and_weights(exported, model, elsewhere):
    code = example(exported / "README.md", "import timm")
    code += "out['image'] = image\nout['mean'], out['std'] = (model.pretrained_cfg[k] for k in ('mean', 'std'))\n"
    code += "out['crop'] = model.pretrained_cfg['crop_pct']\nout['kernel'] = model.pretrained_cfg['interpolation']\n"
    found = elsewhere(code, exported.parent, "sentence_transformers", "transformers")
    close(found["image"], model.encode_image([exported.parent / "photo.jpg"]))
    config = model.vision.config
    assert (tuple(found["mean"]), tuple(found["std"]), found["crop"]) == (config.mean, config.std, config.crop_pct)
    assert str(found["kernel"]) == "bilinear"


def test_our_own_reader_gives_the_vectors_and_the_example_runs(exported, model, sentences, pictures, monkeypatch):
    back = DualEncoder.from_pretrained(exported)
    close(back.encode_text(sentences), model.encode_text(sentences))
    close(back.encode_text(sentences, task="retrieval.query"), model.encode_text(sentences, task="retrieval.query"))
    images = [picture.image for picture in pictures]
    assert np.array_equal(back.encode_image(images), model.encode_image(images))
    assert (back.text.config.adapters, back.text.config.max_length) == ((), 2000)
    assert (back.vision.config, back.matryoshka_dims) == (model.vision.config, model.matryoshka_dims)
    monkeypatch.chdir(exported.parent)
    exec(example(exported / "README.md", "DualEncoder"), {})


def test_weights_stand_on_the_disk_once(exported, model):
    files = [file for file in exported.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix in (".safetensors", ".bin", ".pt")]
    assert sorted(str(file.relative_to(exported)) for file in weights) == [
        "text/model.safetensors",
        "vision/model.safetensors",
    ]
    assert all(file.stat().st_nlink == 1 and not file.is_symlink() for file in files)
    bare = sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" not in n)
    assert sum(file.stat().st_size for file in weights) < bare + 4 * 32 * 33 + 20_000  # the pooler's zeros, two headers


def test_kept_adapters_are_peft_folders_and_the_directory_says_so(make_model, save, sentences, tmp_path, elsewhere):
    model = make_model(adapters=("retrieval.query", "separation"))
    save(tmp_path / "run" / "stage1", model)
    assert main(["export", str(tmp_path / "run" / "stage1"), str(tmp_path / "kept"), "--lora", "kept"]) == 0
    kept = tmp_path / "kept"
    assert not (kept / "modules.json").exists()
    assert not list(kept.rglob("unmerged*"))
    assert json.loads((kept / "text/config.json").read_text())["trilith"]["adapters"] == [
        "retrieval.query",
        "separation",
    ]
    back = DualEncoder.from_pretrained(kept)
    for task in (None, "retrieval.query", "separation"):
        close(back.encode_text(sentences, task=task), model.encode_text(sentences, task=task))
    code = (
        example(kept / "README.md", "load_adapter")
        + """
out["text"] = text
from peft import PeftModel
model = PeftModel.from_pretrained(AutoModel.from_pretrained("kept/text"), "kept/text/separation").eval()
states = model(**batch).last_hidden_state
out["other"] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).detach()
"""
    )
    found = elsewhere(code, tmp_path, "sentence_transformers", "sentencepiece")
    apples = ["a red apple", "ein roter Apfel"]
    close(found["text"], model.encode_text(apples))
    close(found["other"], model.encode_text(apples, task="separation"))
    refused = "from sentence_transformers import SentenceTransformer\ntry:\n    SentenceTransformer('kept')\n"
    elsewhere(refused + "    raise SystemExit('it loads')\nexcept (ValueError, OSError):\n    pass\n", tmp_path)


def test_only_the_merged_adapters_task_is_known_afterwards(make_model, save, tmp_path, capsys):
    model = make_model(
        adapters=("retrieval.query", "separation"), text={"instructions": {"separation": "apart: ", "topic": "topic: "}}
    )
    save(tmp_path / "stage1", model)
    assert main(["export", str(tmp_path / "stage1"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "retrieval.query is merged" in said
    assert "not in this directory: the adapters separation" in said
    assert "`separation` are not in this directory" in (tmp_path / "out/README.md").read_text()
    text = TextTower.from_pretrained(tmp_path / "out/text")
    assert text.config.instructions == {"retrieval.query": "", "topic": "topic: "}
    prompts = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "", "retrieval.query": "", "topic": "topic: "}
    close(text.encode(["a"], task="retrieval.query"), model.encode_text(["a"], task="retrieval.query"))
    with pytest.raises(ValueError, match="unknown task 'separation'"):
        text.encode(["a"], task="separation")


def test_a_border_around_pictures_is_timms_and_takes_rgb(make_model, save, pictures, exported, tmp_path, elsewhere):
    """What transformers' own processors cannot do is left to timm's steps: exact, and loud about other modes."""
    model = make_model(vision={"crop_mode": "border"})
    save(tmp_path / "run/stage1", model)
    assert main(["export", str(tmp_path / "run/stage1"), str(tmp_path / "model")]) == 0
    shutil.copy(exported.parent / "photo.jpg", tmp_path)
    card = tmp_path / "model/README.md"
    code = example(card, "sentence_transformers") + "out['st'] = image\n" + example(card, "AutoImageProcessor")
    code += (
        "out['image'] = image\n"
        + stored(tmp_path, [], pictures)
        + """
model = SentenceTransformer("model", device="cpu")
out["images"] = model.encode([image for image in images if image.mode == "RGB"])
for image in images[3:5]:
    try:
        model.encode([image])
        raise SystemExit(f"{image.mode} is encoded")
    except (RuntimeError, ValueError):
        pass
"""
    )
    found = elsewhere(code, tmp_path)
    photo = model.encode_image([tmp_path / "photo.jpg"])
    close(found["image"], photo)
    close(found["st"], model.encode_image([tmp_path / "photo.jpg"], truncate_dim=16))
    close(found["images"], model.encode_image([p.image for p in pictures if p.image.mode == "RGB"]))


@pytest.mark.full
def test_the_card_works_where_only_its_libraries_are_installed(exported, model, tmp_path):
    """In an environment of its own, which has neither our packages nor sentencepiece."""
    uv = shutil.which("uv") or pytest.fail("uv is missing; bash launch/environment.sh installs it")
    python, root = tmp_path / "env/bin/python", Path(__file__).parents[3]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    limits = ["--constraint", root / "launch/constraints.txt"]
    packages = ["sentence-transformers", "timm", "pillow"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *limits, *packages], check=True)
    blocks = examples(exported / "README.md")
    kinds = ("SentenceTransformer", "AutoTokenizer", "pipeline", "AutoImageProcessor", "import timm")
    chosen = [next(code for code in blocks if kind in code) for kind in kinds]
    expected = model.encode_text(["a red apple"]), model.encode_image([exported.parent / "photo.jpg"])
    for code in chosen:
        last = (
            "\nimport numpy\nnumpy.savez('found.npz', **{k: v for k, v in globals().items() if k in ('text', 'image')})"
        )
        (exported.parent / "alone.py").write_text(code + last)
        subprocess.run([python, "-I", "-W", "ignore", "alone.py"], cwd=exported.parent, check=True)
        found = dict(np.load(exported.parent / "found.npz"))
        for name, whole in zip(("text", "image"), expected, strict=True):
            if name in found:
                dims = found[name].shape[1]
                cut = whole[:, :dims] / np.linalg.norm(whole[:, :dims], axis=1, keepdims=True)
                close(found[name][:1], cut)
    listed = subprocess.run([uv, "pip", "list", "--python", python], capture_output=True, text=True, check=True).stdout
    assert "trilith" not in listed
    assert "sentencepiece" not in listed
