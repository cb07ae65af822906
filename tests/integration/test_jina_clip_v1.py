"""The recipe of jina-clip-v1: what it says, and all of its stages in small, from data to the published layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_prep.shards import Dataset
from PIL import Image
from stage_trainer import DualEncoder
from stage_trainer.build import build_model, tower_configs
from stage_trainer.commands.dry_run import dry_run
from stage_trainer.errors import UserError
from stage_trainer.formats.jina_clip import check_fits
from stage_trainer.recipe.read import load
from text_tower import TextTower, TextTowerConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch/recipes/jina-clip-v1.yaml"
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}  # fmt: skip
ROWS = 400  # of the word table: that of a tokenizer with fewer words, filled up


def test_what_is_not_marked_as_ours_is_what_is_known_of_the_published_training():
    """Published.md, B7 and B2, typed a second time."""
    loaded = load(RECIPE)
    recipe = loaded.recipe
    assert [stage.max_tokens for stage in recipe.stages] == [77, 512, 512]
    assert all(stage.resolution == ((0, 224),) for stage in recipe.stages)
    assert all(stage.loss.dims == (768,) and stage.loss.min_temperature == 0.01 for stage in recipe.stages)
    assert recipe.model.temperature == 0.07
    sets = [{source.path for source in stage.data.image_text} for stage in recipe.stages]
    assert sets == [{"image-short/laion400m"}, {"image-long/sharegpt4v"}, {"image-long/sharegpt4v"}]
    triplets = {
        source.path.removeprefix("text-triplets/").removesuffix("-hard") for source in recipe.stages[2].data.text
    }
    assert triplets == {"msmarco", "nq", "hotpotqa", "allnli", "quora", "fever"}
    for stage in range(3):
        for name in ("steps", "batch", "lr", "warmup_steps", "patch_dropout", "augmentation", "trainable"):
            assert f"stages.{stage}.{name}" in loaded.ours
        for name in ("max_tokens", "resolution", "loss"):
            assert f"stages.{stage}.{name}" not in loaded.ours
    assert {"optimizer", "precision", "model.text_weights", "model.vision_weights"} <= loaded.ours


def test_a_dry_run_counts_the_published_parameters():
    text = dry_run(load(RECIPE, stage=1), 1)
    assert "136,777,728  text" in text
    assert "85,869,312  vision at 224 px, a grid of 14 × 14 patches" in text
    assert "our choice  steps" in text


def test_it_starts_from_jina_embeddings_v2_and_a_tower_that_the_layout_can_hold(tmp_path):
    recipe = load(RECIPE).recipe
    text, vision = tower_configs(recipe, 1)
    assert (vision.reference_grid, vision.grid) == (None, (14, 14))
    check_fits(text, vision)
    shape = {"vocab_size": 48, "width": 24, "layers": 1, "heads": 6, "mlp_width": 16}
    kind = {"positions": "alibi", "mlp": "geglu", "token_types": 2, "pad_id": 0, "layer_norm_eps": 1e-12}
    there = TextTower(TextTowerConfig(**shape, **kind))
    there.save_pretrained(tmp_path / "v2")
    here = [f"model.text_weights={tmp_path}/v2", "model.vision_weights=null", "model.override={}",
            "model.vision={patch: 16, width: 24, layers: 1, heads: 2, reference_grid: null}"]  # fmt: skip
    here += [f"stages.{stage}.loss.dims=[24]" for stage in (1, 2, 3)]
    here += [f"model.text.{name}={value}" for name, value in shape.items()]
    model = build_model(load(RECIPE, here).recipe, 1)
    torch.testing.assert_close(dict(model.text.state_dict()), dict(there.state_dict()), rtol=0, atol=0)
    with pytest.raises(UserError, match="model.text.token_types is 1, but the weights in .* say 2"):
        build_model(load(RECIPE, [*here, "model.text.token_types=1"]).recipe, 1)


def write_tokenizer(folder, corpus):
    """A WordPiece tokenizer as BERT's, of the corpus's own words."""
    folder.mkdir()
    dataset = Dataset.open(corpus / "train/text-pairs/drawn")
    texts = [dataset.read(i)["json"].decode() for i in range(len(dataset))]
    built = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=ROWS - 5, special_tokens=list(SPECIAL.values()), show_progress=False, min_frequency=1
    )
    built.train_from_iterator(texts, trainer)
    ids = [(token, built.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    built.save(str(folder / "tokenizer.json"))
    settings = {**SPECIAL, "do_lower_case": True, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return built.get_vocab_size()


DATA = (
    "{image_text: [{path: image-short/drawn}], text: [{path: text-pairs/drawn}]}",
    "{image_text: [{path: image-long/drawn}], text: [{path: text-pairs/drawn}]}",
    "{image_text: [{path: image-long/drawn}], text: [{path: text-triplets/drawn}]}",
)


@pytest.mark.full  # three starts of the trainer
def test_the_recipe_runs_in_small_from_data_to_the_published_layout(run, tmp_path, drawn_corpus):
    words = write_tokenizer(tmp_path / "words", drawn_corpus)
    assert words < ROWS - 4  # or the table would not be filled up
    rows = -(-words // 8) * 8
    settings = [
        "corpus={corpus}", "output=run", "model.tokenizer=words", "precision=fp32", "workers=0", "log_every=1",
        "model.text_weights=null", "model.vision_weights=null", "evaluation={every: 0, pools: [image-short/drawn]}",
        "checkpoint={every: 10, keep: 1}", "model.override={}",
        "model.vision={patch: 8, width: 36, layers: 2, heads: 3, mlp_ratio: 2.6667, reference_grid: null}",
        *(f"model.text.{key}={value}" for key, value in {
            "vocab_size": rows, "width": 36, "layers": 2, "heads": 6, "mlp_width": 48, "compile": "false"}.items()),
    ]  # fmt: skip
    for stage, data in enumerate(DATA, 1):
        settings += [f"stages.{stage}.{setting}" for setting in (
            "steps=10", "warmup_steps=2", "resolution=[[0, 32]]", "batch={image_text: 16, text: 16}",
            "lr={image: 1e-3, text: 1e-3}", "loss.dims=[36]", f"data={data}", "deepspeed={}",
            "gradient_cache={images: 8, tokens: 300}")]  # fmt: skip
    for stage in (1, 2, 3):
        run("stage-trainer", "train", "--recipe", RECIPE, "--stage", stage, *settings)
    run("stage-trainer", "export", "run/stage3", "model", "--format", "jina-clip-v1")
    trained = DualEncoder.from_pretrained(max((tmp_path / "run/stage3").glob("step-*")) / "model")
    exported = DualEncoder.from_pretrained(tmp_path / "model")
    assert (exported.text.config.positions, exported.text.config.mlp) == ("alibi", "geglu")
    assert exported.vision.config.reference_grid is None
    texts, images = ["a red circle", "two blue squares"], [Image.new("RGB", (40, 32), "red")]
    assert np.array_equal(exported.encode_text(texts), trained.encode_text(texts))
    assert np.array_equal(exported.encode_image(images), trained.encode_image(images))
    assert json.loads((tmp_path / "model/config.json").read_text())["vision_config"]["pt_hw_seq_len"] == 4
    figures = run("stage-trainer", "evaluate", "model", "{corpus}", "--json", "figures.json").stdout
    assert "drawn" in figures
    refused = run("stage-trainer", "export", "run/stage3", "other", fails=True).stderr
    assert "use --format jina-clip-v1, or onnx" in refused
    run("stage-trainer", "export", "run/stage3", "graphs", "--format", "onnx", "--dtype", "float32")
    import onnxruntime

    ids = exported.text.tokenizer(texts)
    longest = max(map(len, ids))
    padded = np.array([[*row, *[0] * (longest - len(row))] for row in ids])
    session = onnxruntime.InferenceSession(tmp_path / "graphs/onnx/text_model.onnx")
    (found,) = session.run(["l2norm_text_embeddings"], {"input_ids": padded})
    assert np.abs(found - exported.encode_text(texts)).max() < 1e-5
