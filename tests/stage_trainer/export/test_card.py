"""The model card says what is true of this model and of no other."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from stage_trainer.cli import main
from stage_trainer.formats import history, snippets
from stage_trainer.formats.onnx import examples
from text_tower import TextTowerConfig
from text_tower.st_folder import MAX_LENGTH
from vision_tower import VisionTowerConfig

README = Path(__file__).parents[3] / "packages/stage-trainer/README.md"
FIGURES = {
    "emoji": {
        "kind": "image-short", "images": 245, "texts": {"en": 245, "de": 245, "drawn": 2},
        "recall_at_5": {"text to image": {"32": {"mean": 0.5, "en": 0.61, "de": 0.39}, "16": {"mean": 0.2, "en": 0.3}}},
        "chance": {"text to image": {"mean": 0.0204}},
    },
    "pairs": {"targets": 9, "ndcg_at_10": {"32": {"mean": 0.7, "fr": 0.701}}},
}  # fmt: skip


def card_of(out) -> tuple[dict, str]:
    text = (out / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def export(source, out) -> tuple[dict, str]:
    assert main(["export", str(source), str(out)]) == 0
    return card_of(out)


def test_the_card_has_recipe_data_and_figures_by_language_and_dim(model, save, tmp_path):
    checkpoint = save(tmp_path / "run/stage1", model, {"text-pairs/mine": "def"}, stage__lr__image=2e-4)
    figures = {name: {**pool, "checkpoint": checkpoint.name} for name, pool in FIGURES.items()}
    (tmp_path / "run/stage1/evaluation.json").write_text(json.dumps(figures))
    head, body = export(tmp_path / "run/stage1", tmp_path / "model")
    assert head["language"] == ["de", "en", "fr"]
    assert head["library_name"] == "sentence-transformers"
    for line in (
        "| steps | 4 |", "| learning rate, image tower | 0.0002 |", "| data | `image-short/drawn`, `text-pairs/mine` |",
        "| texts seen | 32 |", "| en | 61.0 | 30.0 |", "| de | 39.0 |  |", "| fr | 70.1 |", "recall@5, text to image",
        "A blind guess has text to image 2.0.", "`retrieval.query` is merged into the weights",
        "- Task `retrieval.query` puts 'find: ' before a text.", f"max_length={MAX_LENGTH}",
    ):  # fmt: skip
        assert line in body, line


def test_figures_of_another_checkpoint_are_not_shown(model, save, tmp_path):
    save(tmp_path / "stage1", model)
    other = {name: {**pool, "checkpoint": "step-0000003"} for name, pool in FIGURES.items()}
    (tmp_path / "stage1/evaluation.json").write_text(json.dumps(other))
    head, body = export(tmp_path / "stage1", tmp_path / "model")
    assert "language" not in head
    assert "Not measured." in body
    (tmp_path / "stage1/evaluation.json").write_text("{")
    assert main(["export", str(tmp_path / "stage1"), str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_the_stages_that_led_to_a_model_are_told_and_no_others(model, save, tmp_path):
    first = save(tmp_path / "run/stage1", model, stage__max_tokens=11)
    digest = history.at(first).model_digest()
    save(tmp_path / "run/stage2", model, {"the model of stage 1": digest}, stage__max_tokens=22)
    _, body = export(tmp_path / "run/stage2", tmp_path / "both")
    assert body.index("| tokens of a text | 11 |") < body.index("| tokens of a text | 22 |")
    assert "the model of stage" not in body
    shutil.rmtree(tmp_path / "run/stage2")
    save(tmp_path / "run/stage2", model, {"the model of stage 1": "another"}, stage__max_tokens=22)
    _, body = export(tmp_path / "run/stage2", tmp_path / "one")
    assert "| tokens of a text | 11 |" not in body


@pytest.mark.parametrize(
    ("settings", "licence", "words"),
    [
        ({}, None, "No weights of others went into this model."),
        ({"model__weights": "jinaai/jina-clip-v2"}, "cc-by-nc-4.0", "not for commercial use"),
        (
            {
                "model__text_weights": "FacebookAI/xlm-roberta-large",
                "model__vision_weights": "EVA02_CLIP_L_psz14_s4B.pt",
            },
            None,
            "MIT allows any use",
        ),
        (
            {"model__text_weights": "jinaai/jina-embeddings-v3", "model__vision_weights": "timm/eva02_large_patch14"},
            "cc-by-nc-4.0",
            "`timm/eva02_large_patch14` is under MIT",
        ),
        ({"model__weights": "somebody/else"}, None, "a licence that could not be found out"),
    ],
)
def test_the_licence_of_the_starting_weights_and_what_follows(settings, licence, words, model, save, tmp_path):
    save(tmp_path / "stage1", model, **settings)
    head, body = export(tmp_path / "stage1", tmp_path / "model")
    assert head.get("license") == licence
    assert words in body
    names = [name for name in settings.values() if "/" in name]
    assert head.get("base_model", []) == names


def test_a_licence_is_handed_down_from_export_to_export(model, save, tmp_path):
    save(tmp_path / "stage1", model, model__weights="jinaai/jina-clip-v2")
    export(tmp_path / "stage1", tmp_path / "first")
    save(tmp_path / "tuned/stage1", model, model__text_weights=str(tmp_path / "first/text"))
    head, body = export(tmp_path / "tuned/stage1", tmp_path / "second")
    assert head["license"] == "cc-by-nc-4.0"
    assert "base_model" not in head
    assert "`first/text` is under CC-BY-NC-4.0" in body
    assert str(tmp_path) not in body
    head, body = export(tmp_path / "second", tmp_path / "third")  # an export of an export
    assert head["license"] == "cc-by-nc-4.0"
    assert "does not say how it was trained" in body


@pytest.mark.parametrize(
    ("name", "content", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("README.md", "---\nlicense: [1\n---\n", None),
        ("README.md", "---\nlicense: {a: 1}\n---\n", None),
        ("README.md", "---\nlicense: 'x\\e[2J'\n---\n", None),
        ("README.md", "no head", None),
        (
            "config.json",
            '{"auto_map": {"AutoModel": "jinaai/jina-clip-implementation--modeling_clip"}}',
            "cc-by-nc-4.0",
        ),
        ("config.json", '{"_name_or_path": "jinaai/jina-embeddings-v3"}', "cc-by-nc-4.0"),
        ("config.json", "{", None),
    ],
)
def test_a_folder_of_weights_says_its_licence_or_nothing(name, content, licence, tmp_path):
    (tmp_path / name).write_text(content)
    assert history.licence_of(str(tmp_path)) == licence


def test_the_readme_shows_the_examples_of_the_cards_and_all_say_normalize_embeddings():
    """Which run in other tests. sentence-transformers cuts after it has normalised."""
    about = snippets.Model("my-model", 256, 512, "retrieval.query", None, True)
    of_graphs = examples._Model("my-model", TextTowerConfig(), VisionTowerConfig(resolution=512), "float32")
    makers = (snippets.trilith, snippets.sentence_transformers, snippets.transformers_texts,
              snippets.transformers_images, snippets.timm, snippets.open_clip, snippets.jina_clip)  # fmt: skip
    codes = [make(about) for make in makers]
    codes += [examples.onnxruntime(of_graphs), examples.transformers_js(of_graphs)]
    blocks = re.findall(r"```(?:python|js)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert sorted(block for block in blocks if block in codes) == sorted(codes)  # others are of other things
    (code,) = [code for code in codes if "SentenceTransformer(" in code]
    assert code.count("model.encode(") == code.count("normalize_embeddings=True") == 3


@pytest.mark.parametrize("lora", ["kept", "merged"])
def test_the_published_layout_has_a_card_whose_example_runs(make_model, save, tmp_path, monkeypatch, lora):
    model = make_model(vision={"crop_pct": 1.0})
    save(tmp_path / "run" / "stage1", model)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 50), "red").save("photo.jpg")
    assert main(["export", "run/stage1", "model", "--format", "jina-clip", "--lora", lora, "--dtype", "float32"]) == 0
    card = Path("model/README.md").read_text(encoding="utf-8")
    ours, theirs = (part.partition("```")[0] for part in card.split("```python\n")[1:])
    found: dict[str, object] = {}
    exec(ours, found)
    expected = model.encode_text(["a red apple", "ein roter Apfel"], truncate_dim=16)
    assert np.abs(found["text"] - expected).max() < 1e-6
    compile(theirs, "card", "exec")  # the published code is on the hub alone
    assert 'AutoModel.from_pretrained("model", trust_remote_code=True)' in theirs
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], "custom_code" in head["tags"]) == ("transformers", True)
    assert ("is kept apart in the weights, and always on" in card) == (lora == "kept")
    assert ("is merged into the weights: do not apply it again" in card) == (lora == "merged")
    assert "| stage1 |" in card
