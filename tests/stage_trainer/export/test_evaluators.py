"""Evaluators of sentence-transformers, CLIP_benchmark and mteb on our exports: they find what trec_eval, scipy and our
own measures find in our own vectors."""

import json
import sys
import types

import mteb
import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import torch
from clip_benchmark.datasets.builder import get_dataset_collate_fn
from clip_benchmark.metrics import zeroshot_retrieval
from clip_benchmark.models import load_clip
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import evaluation
from stage_trainer import mteb_model
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.cross_modal import recall

DIM = 16


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Squares of the model's size, which every library takes as they are."""
    draw = np.random.default_rng(3)
    return [Image.fromarray(draw.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(20)]


@pytest.fixture(scope="module")
def theirs(exported) -> SentenceTransformer:
    return SentenceTransformer(str(exported), device="cpu")


@pytest.fixture(scope="module")
def ours(exported) -> DualEncoder:
    return DualEncoder.from_pretrained(exported)


def ndcg(queries: np.ndarray, corpus: np.ndarray, right: dict[str, set[str]]) -> float:
    units = [rows[:, :DIM] / np.linalg.norm(rows[:, :DIM], axis=1, keepdims=True) for rows in (queries, corpus)]
    cosines = units[0].astype(np.float64) @ units[1].astype(np.float64).T
    run = {f"q{q}": {f"d{d}": float(value) for d, value in enumerate(row)} for q, row in enumerate(cosines)}
    qrels = {query: dict.fromkeys(of, 1) for query, of in right.items()}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
    return float(np.mean([of["ndcg_cut_10"] for of in found.values()]))


@pytest.mark.parametrize("task", ["retrieval.query", None])
@pytest.mark.parametrize("of_images", [False, True], ids=["texts", "images"])
def test_information_retrieval_of_sentence_transformers(of_images, task, theirs, ours, sentences, photos, tmp_path):
    """It asks by `encode_query`, which puts the model's instruction before queries unless an empty prompt is given."""
    queries = sentences[:10]
    corpus = photos if of_images else sentences[10:30]
    right = {f"q{n}": {f"d{n}", f"d{(7 * n + 3) % 20}"} for n in range(10)}
    evaluator = evaluation.InformationRetrievalEvaluator(
        {f"q{n}": text for n, text in enumerate(queries)}, {f"d{n}": item for n, item in enumerate(corpus)}, right,
        truncate_dim=DIM, write_csv=False, name="made", query_prompt=None if task else "",
    )  # fmt: skip
    rows = ours.encode_image(corpus) if of_images else ours.encode_text(corpus)
    expected = ndcg(ours.encode_text(queries, task=task), rows, right)
    assert 0.1 < expected < 0.9
    assert evaluator(theirs, str(tmp_path))["made_cosine_ndcg@10"] == pytest.approx(expected, abs=1e-12)


def test_embedding_similarity_of_sentence_transformers(theirs, ours, sentences, tmp_path):
    left, right = sentences[:15], sentences[15:30]
    said = np.random.default_rng(4).integers(0, 6, 15) / 5
    evaluator = evaluation.EmbeddingSimilarityEvaluator(left, right, said.tolist(), write_csv=False, name="made")
    cosines = (ours.encode_text(left).astype(np.float64) * ours.encode_text(right)).sum(axis=1)
    expected = scipy.stats.spearmanr(cosines, said).statistic
    assert evaluator(theirs, str(tmp_path))["made_spearman_cosine"] == pytest.approx(expected, abs=1e-12)


def test_mteb_takes_models_of_other_libraries(exported, theirs, of_open_clip, sentences, photos):
    """By `mteb_model` they are what their libraries say, and the modalities are those that they have."""
    task = mteb.get_task("STSBenchmark").metadata
    inputs = {"task_metadata": task, "hf_split": "test", "hf_subset": "default"}
    of_texts = mteb_model(exported / "text")
    assert of_texts.mteb_model_meta.modalities == ["text"]
    assert of_texts.embedder.settings["library"].startswith("sentence-transformers")
    found = of_texts.encode([{"text": sentences[:5]}, {"text": sentences[5:9]}], **inputs)
    assert np.abs(found - theirs.encode(sentences[:9], normalize_embeddings=True)).max() < 1e-6
    model, folder = of_open_clip
    of_both = mteb_model(folder)
    assert of_both.mteb_model_meta.modalities == ["text", "image"]
    assert of_both.embedder.settings["library"].startswith("open_clip")
    assert np.abs(of_both.encode([{"image": photos[:3]}], **inputs) - model.encode_image(photos[:3])).max() < 2e-6
    assert of_both.mteb_model_meta.revision != of_texts.mteb_model_meta.revision


@pytest.fixture(scope="module")
def of_open_clip(make_model, save, tmp_path_factory):
    """(a model, its export for open_clip)"""
    folder, model = tmp_path_factory.mktemp("open_clip"), make_model(vision={"crop_pct": 1.0})
    save(folder / "run" / "stage1", model)
    assert main(["export", str(folder / "run" / "stage1"), str(folder / "model"), "--format", "open-clip"]) == 0
    return model, folder / "model"


def captioned(photos, sentences) -> tuple[list[str], list[int]]:
    """One to three captions of each photo, unequal in number: (captions, the photo of each)."""
    image_of = [n for n in range(len(photos)) for _ in range(1 + n % 3)]
    return [f"{sentences[k % 30][:20]} {sentences[k * 7 % 30][:20]}" for k in range(len(image_of))], image_of


def test_clip_benchmark_as_it_is_measures_an_export_for_open_clip(of_open_clip, photos, sentences):
    model, folder = of_open_clip
    their, transform, tokenizer = load_clip("open_clip", f"local-dir:{folder}", "", None, "cpu")
    captions, image_of = captioned(photos, sentences)
    own = [[captions[k] for k, of in enumerate(image_of) if of == n] for n in range(len(photos))]
    rows = [(transform(photo), texts) for photo, texts in zip(photos, own, strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=7, collate_fn=get_dataset_collate_fn("mscoco_captions"))
    found = zeroshot_retrieval.evaluate(their.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=[5])
    expected = recall(model.encode_image(photos), model.encode_text(captions), image_of)
    assert all(0.1 < value < 0.9 for value in expected)
    names = ("image_retrieval_recall@5", "text_retrieval_recall@5")
    assert [found[name] for name in names] == pytest.approx(list(expected), abs=1e-6)  # they are means in float32


def test_the_command_of_clip_benchmark_measures_an_export(of_open_clip, photos, sentences, tmp_path, monkeypatch):
    """On XTD10's files. What measures written captions is not installed; only the command imports it."""
    model, folder = of_open_clip
    modules = ["bleu.bleu", "meteor.meteor", "rouge.rouge", "cider.cider", "spice.spice", "tokenizer.ptbtokenizer"]
    for name, kind in zip(modules, ["Bleu", "Meteor", "Rouge", "Cider", "Spice", "PTBTokenizer"], strict=True):
        module = types.ModuleType(f"pycocoevalcap.{name}")
        setattr(module, kind, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    from clip_benchmark.cli import main as clip_benchmark

    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
    listed = {"image_paths": [str(tmp_path / f"{n}.png") for n in range(20)], "annotations": sentences[:20]}
    (tmp_path / "xtd10-en.json").write_text(json.dumps(listed))
    words = f"eval --model local-dir:{folder} --pretrained= --no_amp --dataset xtd10 --dataset_root {tmp_path}"
    words += f" --language en --task zeroshot_retrieval --num_workers 0 --output {tmp_path}/found.json"
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words.split()])
    clip_benchmark()
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    expected = recall(model.encode_image(photos), model.encode_text(sentences[:20]), range(20))
    assert list(found.values()) == pytest.approx(list(expected), abs=1e-6)
