"""Any model as a column: small ones that each library makes and saves itself, and by that library alone compared."""

import io
import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from stage_trainer.cli import main
from stage_trainer.commands.any_model import open_any
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.evaluation.models import Asked

from .conftest import jpg
from .test_texts import beir_folder

TEXTS = ["a red disk", "two blue disks , one red", "disk"]
WORDS = ["<pad>", "<unk>", "a", "red", "blue", "disk", "disks", "two", "one", ","]
ON_CPU = Asked(device="cpu")


def pictures() -> list[Image.Image]:
    return [Image.open(io.BytesIO(jpg(n))).convert("RGB") for n in range(3)]


@pytest.fixture(scope="module")
def of_open_clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    shape = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**shape).state_dict(), folder / "open_clip_model.safetensors")
    pre = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": pre}))
    return folder


def bert(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[2:]]))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(2)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_sentence_transformers(tmp_path_factory) -> Path:
    words = Transformer(str(bert(tmp_path_factory.mktemp("bert"))), max_seq_length=16)
    pooling = Pooling(16, pooling_mode="cls")
    folder = tmp_path_factory.mktemp("sentences")
    SentenceTransformer(modules=[words, pooling], prompts={"query": "two "}, device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 40, "eos_token_id": 1, "bos_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(3)
    transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).save_pretrained(folder)
    letters = sorted({*"".join(TEXTS)} - {" "})
    vocab = {
        word: n for n, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)])
    }
    assert len(vocab) <= 40
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_open_clips_vectors_are_its_own(of_open_clip):
    found = open_any(of_open_clip, ON_CPU)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{of_open_clip}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{of_open_clip}")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(TEXTS)).numpy()
        images = model.encode_image(torch.stack([preprocess(picture) for picture in pictures()])).numpy()
    assert np.allclose(found.embed_texts(TEXTS), texts, atol=1e-6)
    assert np.allclose(found.embed_images([jpg(n) for n in range(3)]), images, atol=1e-6)
    assert found.dims == (24,)
    assert found.settings["max_length"] == "12 (its own)"


def test_sentence_transformers_vectors_are_its_own(of_sentence_transformers):
    found = open_any(of_sentence_transformers, Asked(device="cpu", query_task="query"))
    model = SentenceTransformer(str(of_sentence_transformers), device="cpu")
    assert np.allclose(found.embed_texts(TEXTS), model.encode(TEXTS), atol=1e-6)
    queries = model.encode(TEXTS, prompt_name="query")
    assert np.allclose(found.embed_texts(TEXTS, query=True), queries, atol=1e-6)
    assert not np.allclose(found.embed_texts(TEXTS), queries, atol=1e-3)
    assert found.settings["instruction of queries"] == "'two '"
    other = open_any(of_sentence_transformers, Asked(device="cpu", query_task="retrieval.query"))
    assert other.settings["instruction of queries"] == "none, not knowing retrieval.query"
    assert not found.sees
    with pytest.raises(UserError, match="has no image tower; measure it with --suite text"):
        found.embed_images([jpg(0)])
    assert open_any(of_sentence_transformers, Asked(max_length=3, device="cpu")).settings["max_length"] == "3"


def test_a_text_tower_of_transformers_gets_mean_pooling_and_it_is_said(tmp_path):
    folder = bert(tmp_path)
    found = open_any(folder, ON_CPU)
    model, tokenizer = (
        transformers.AutoModel.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    for text in TEXTS:
        with torch.no_grad():
            expected = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert np.allclose(found.embed_texts([text])[0], expected, atol=1e-5)
    assert found.settings["pooling"] == "mean, for want of a modules.json"


def test_transformers_vectors_are_its_own(of_transformers):
    found = open_any(of_transformers, ON_CPU)
    model = transformers.CLIPModel.from_pretrained(of_transformers).eval()
    processor = transformers.CLIPProcessor.from_pretrained(of_transformers)
    with torch.no_grad():
        inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
        out = model(**inputs)

    def units(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    assert np.allclose(units(found.embed_texts(TEXTS)), out.text_embeds.numpy(), atol=1e-6)
    assert np.allclose(units(found.embed_images([jpg(n) for n in range(3)])), out.image_embeds.numpy(), atol=1e-6)


def test_ours_is_read_as_ours_in_each_of_its_formats(export, tmp_path):
    from stage_trainer.formats import common, jina_clip, open_clip

    model = DualEncoder.from_pretrained(export)
    expected = model.encode_text(TEXTS, normalize=False)
    common.write(DualEncoder.from_pretrained(export), tmp_path / "default", "merged", lambda _: "")
    found = open_any(tmp_path / "default", ON_CPU)  # it is sentence-transformers' too
    assert "library" not in found.settings
    assert found.dims == (16, 8)
    assert np.allclose(found.embed_texts(TEXTS), expected, atol=1e-6)
    jina_clip.write(DualEncoder.from_pretrained(export), tmp_path / "published", dtype="float32")
    published = open_any(tmp_path / "published", ON_CPU)  # the layout of jina-clip-v2
    assert "library" not in published.settings
    assert np.allclose(published.embed_texts(TEXTS), expected, atol=1e-5)
    open_clip.write(DualEncoder.from_pretrained(export), tmp_path / "theirs", None, lambda _: "")
    theirs = open_any(tmp_path / "theirs", ON_CPU)
    assert theirs.settings["library"].startswith("open_clip")
    rows = theirs.embed_texts(TEXTS)
    assert np.allclose(rows / np.linalg.norm(rows, axis=1, keepdims=True), model.encode_text(TEXTS), atol=1e-5)


def test_models_of_two_libraries_are_columns_of_one_table(export, of_open_clip, photos, tmp_path, capsys):
    words = ["--table", "9", "--beside", str(of_open_clip), "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(export), str(photos), *words]) == 0
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Language"))
    assert re.split(r"  +", head)[1:3] == ["small", of_open_clip.name]
    figures = json.loads((tmp_path / "out/figures.json").read_text())
    assert list(figures["models"]) == [str(export), str(of_open_clip)]


def test_a_text_model_has_the_tables_of_texts_alone(of_sentence_transformers, photos, tmp_path, capsys):
    beir_folder(tmp_path / "data/scifact")
    words = ["--suite", "all", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(of_sentence_transformers), str(tmp_path / "data"), *words]) == 0
    assert "Table 10" in capsys.readouterr().out
    assert main(["evaluate", str(of_sentence_transformers), str(photos), *words]) == 2
    assert "has no image tower" in capsys.readouterr().err


def test_other_weights_under_the_same_name_have_another_fingerprint(export, tmp_path):
    import shutil

    shutil.copytree(export, tmp_path / "model")
    first = open_any(tmp_path / "model", ON_CPU).fingerprint
    assert open_any(export, ON_CPU).fingerprint == first
    model = DualEncoder.from_pretrained(export)
    with torch.no_grad():
        next(model.text.parameters())[0, 0] += 1e-3
    shutil.rmtree(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert open_any(tmp_path / "model", ON_CPU).fingerprint != first


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), "open_clip cannot load"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "no-such-kind"}'),
            "transformers cannot load",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "has format"),
    ],
)
def test_a_folder_that_no_library_takes_is_refused(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(UserError, match=said):
        open_any(tmp_path, ON_CPU)


def test_a_name_that_open_clip_does_not_list_is_refused():
    with pytest.raises(UserError, match="open_clip has no such model; expected open_clip:ARCHITECTURE/PRETRAINED"):
        open_any(Path("open_clip:ViT-B-32/none-such"), ON_CPU)
