"""Directories of open_clip are read whole: those that we write, and others' of the same towers; the rest by name."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_trainer import weights
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.formats import open_clip
from stage_trainer.recipe import ModelConfig
from text_tower import TextTower
from vision_tower import VisionTower

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture(scope="module")
def model(make_model) -> DualEncoder:
    model = make_model(vision={"crop_pct": 1.0}, adapters=())
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
        model.text_logit_scale.fill_(3.25)
    model.set_biases((-4.5, -1.25))
    return model


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    open_clip.write(model, folder, None, lambda _: "")
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def change(file: Path, *keys: str, value=...) -> None:
    """Sets what stands at the end of these keys, or takes it away."""
    content = json.loads(file.read_text())
    at = content
    for key in keys[:-1]:
        at = at[key]
    at.pop(keys[-1], None)
    if value is not ...:
        at[keys[-1]] = value
    file.write_text(json.dumps(content))


def same_vectors(found: DualEncoder, model: DualEncoder, sentences, pictures) -> None:
    images = [picture.image for picture in pictures]
    assert np.array_equal(found.encode_text(sentences), model.encode_text(sentences))
    assert np.array_equal(found.encode_image(images), model.encode_image(images))


def test_ours_comes_back_with_the_same_bits(folder, model, sentences, pictures):
    back = DualEncoder.from_pretrained(folder)  # a copy, which is not where it was written
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert (back.text.config, back.matryoshka_dims) == (model.text.config, model.matryoshka_dims)
    assert back.vision.config.changed({"mlp_ratio": 2.6667}) == model.vision.config.changed({"mlp_ratio": 2.6667})
    same_vectors(back, model, sentences, pictures)
    query = {"task": "retrieval.query", "truncate_dim": 16}
    assert np.array_equal(back.encode_text(sentences, **query), model.encode_text(sentences, **query))
    assert np.array_equal(TextTower.from_pretrained(folder).encode(sentences), model.encode_text(sentences))
    assert VisionTower.from_pretrained(folder).config == back.vision.config


def test_a_merged_adapter_stays_merged_from_format_to_format(make_model, tmp_path, sentences, monkeypatch):
    model = make_model(vision={"crop_pct": 1.0})
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "saved", "first", "--format", "open-clip"]) == 0
    assert main(["export", "first", "second"]) == 0
    back = DualEncoder.from_pretrained("second")
    assert back.text.config.adapters == ()
    for task in (None, "retrieval.query"):
        found = back.encode_text(sentences, task=task)
        assert np.abs(found - model.encode_text(sentences, task=task)).max() < 1e-6


def test_training_starts_from_it_with_its_temperatures(folder):
    recipe = ModelConfig(weights=str(folder))
    assert weights.log_scales(recipe) == (2.5, 3.25)
    assert weights.biases(recipe) == (-4.5, -1.25)
    (place,) = {weights.tower_weights(recipe, tower, fetch=False) for tower in ("text", "vision")}
    text, unsettled = weights.given(place, "text")
    assert (text.rope_theta, unsettled) == (500.0, frozenset())
    assert weights.given(place, "vision")[0].resolution == 48


def test_what_open_clip_itself_saves_is_read(written, model, tmp_path, sentences, pictures):
    """Both files of weights, its own keys, nothing of ours; config.json comes from where open_clip had it."""
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf

    name = f"local-dir:{written}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name, context_length=20)
    config = json.loads((written / CONFIG).read_text())["model_cfg"]
    config["text_cfg"]["context_length"] = 20
    out = tmp_path / "out"
    out.mkdir()
    save_for_hf(theirs, tokenizer, config, str(out))
    shutil.copy(written / "config.json", out)
    for key in ("trilith", "matryoshka_dimensions", "trilith_clip"):
        change(out / "config.json", key)
    texts = [text.strip() for text in sentences if text]
    images = [picture.image.convert("RGB") for picture in pictures]
    assert theirs.logit_bias.item() == -4.5  # as a sigmoid loss learns one
    with torch.no_grad():
        of_texts = theirs.eval().encode_text(tokenizer(texts), normalize=True).numpy()
        of_images = theirs.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True).numpy()
    for remove in ("", WEIGHTS):  # then the pickle is left
        (out / remove).unlink() if remove else None
        back = DualEncoder.from_pretrained(out)
        assert np.abs(back.encode_text(texts) - of_texts).max() < 2e-6  # cut at 20 tokens, as open_clip does
        assert np.abs(back.encode_image(images) - of_images).max() < 2e-6
        assert (back.logit_scale.item(), back.text_logit_scale.item(), back.matryoshka_dims) == (2.5, 2.5, None)
        assert (back.logit_bias.item(), back.text_logit_bias.item()) == (-4.5, -4.5)
    assert np.abs(model.encode_text(texts) - of_texts).max() > 0.01


def test_an_image_tower_may_have_a_name_of_timms(folder, model, monkeypatch, sentences, pictures):
    import timm

    entry, find = "eva02_base_patch16_clip_224", timm.models.model_entrypoint
    made, small = find(entry), model.vision.config.timm_arguments()
    monkeypatch.setattr(
        timm.models,
        "model_entrypoint",
        lambda name: (lambda **rest: made(**{**small, **rest})) if name == entry else find(name),
    )
    change(folder / CONFIG, "model_cfg", "vision_cfg", "timm_model_name", value=entry)
    same_vectors(DualEncoder.from_pretrained(folder), model, sentences, pictures)


TEXT, VISION = ("model_cfg", "text_cfg"), ("model_cfg", "vision_cfg")


@pytest.mark.parametrize(
    ("file", "keys", "value", "words"),
    [
        (CONFIG, (*TEXT, "hf_model_name"), ..., "names no hf_model_name: its text tower is open_clip's own"),
        (CONFIG, (*TEXT, "hf_tokenizer_name"), ..., "names no hf_tokenizer_name"),
        (CONFIG, (*TEXT, "hf_pooler_type"), "cls_pooler", "hf_pooler_type 'cls_pooler'; a TextTower knows 'mean_pool"),
        (CONFIG, (*TEXT, "hf_proj_type"), "linear", "hf_proj_type 'linear'; a TextTower knows None"),
        (CONFIG, (*TEXT, "hf_proj_type"), ..., "hf_proj_type 'mlp'"),  # open_clip's default
        (CONFIG, (*TEXT, "tokenizer_kwargs"), {"clean": "canonicalize"}, "tokenizer_kwargs {'clean': 'canonicalize'}"),
        (CONFIG, (*TEXT, "tokenizer_mode"), "clips", "tokenizer_mode 'clips'"),
        (CONFIG, (*TEXT, "layers"), 12, "text_cfg has layers, not known here"),
        (CONFIG, (*TEXT, "context_length"), "8", "context_length '8'; expected a whole number"),
        (CONFIG, (*TEXT, "context_length"), 1, "max_length"),
        (CONFIG, ("model_cfg", "multimodal_cfg"), {}, "has a multimodal_cfg"),
        (CONFIG, ("model_cfg", "towers"), 3, "model_cfg has towers, not known here"),
        (CONFIG, ("model_cfg",), ..., "lacks model_cfg"),
        (CONFIG, (*VISION, "timm_pool"), "avg", "timm_pool 'avg', and a VisionTower is made for 'token'"),
        (CONFIG, (*VISION, "timm_pool"), ..., "timm_pool 'avg'"),  # open_clip's default
        (CONFIG, (*VISION, "timm_proj"), ..., "timm_proj 'linear'"),
        (CONFIG, (*VISION, "timm_proj"), None, "expected is timm_proj 'none'"),
        (CONFIG, (*VISION, "timm_model_name"), "hf-hub:some/other", "makes the image tower from 'hf-hub:some/other' "),
        (CONFIG, (*VISION, "timm_model_name"), ..., "names no timm_model_name"),
        (CONFIG, ("preprocess_cfg", "resize_mode"), "longest", "resize_mode 'longest'"),
        ("config.json", ("architecture",), ..., "put the config.json from there beside it"),
        ("config.json", ("attribute_map",), {"hidden_size": "x"}, "attribute_map {'hidden_size': 'x'}"),
        ("config.json", ("model_type",), "bert", "model_type 'bert'"),
        ("config.json", ("hidden_size",), 64, "mis-shaped"),
        ("config.json", ("model_args", "depth"), 3, "missing: blocks.2"),
        ("config.json", ("made_up",), 1, "has made_up 1"),
        ("config.json", ("trilith_clip", "text_logit_scale"), 99, "text_logit_scale is '?99"),
        ("config.json", ("trilith_clip", "text_logit_bias"), "x", "text_logit_bias is 'x'"),
        ("config.json", ("trilith_clip", "more"), 1, "trilith_clip has more, not known there"),
        ("config.json", ("trilith", "tokenizer_fingerprint"), "other", "has another tokenizer than"),
    ],
)
def test_what_its_files_say_else_is_refused_by_name(file, keys, value, words, folder):
    change(folder / file, *keys, value=value)
    with pytest.raises(UserError, match=f"(?s){folder}.*{words}"):
        DualEncoder.from_pretrained(folder)


def moved(folder: Path) -> None:
    (folder / "config.json").unlink()


def beside(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "model.safetensors")


def absent(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


class Runs:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def pickled(folder: Path) -> None:
    absent(folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs()}))


def with_tensor(name: str, *shape: int):
    def damage(folder: Path) -> None:
        save_file({**load_file(folder / WEIGHTS), name: torch.zeros(shape)}, folder / WEIGHTS)

    return damage


def without_scale(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["logit_scale"]
    save_file(tensors, folder / WEIGHTS)


def absolute(folder: Path) -> None:
    """The text tower of open_clip's xlm-roberta-base-ViT-B-32, but small."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = XLMRobertaConfig(**shape, intermediate_size=48)
    text = XLMRobertaModel(config, add_pooling_layer=False).state_dict()
    others = {name: t for name, t in load_file(folder / WEIGHTS).items() if not name.startswith("text.")}
    save_file({**others, **{f"text.transformer.{name}": t for name, t in text.items()}}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (moved, "makes the text tower from .*put the config.json and the tokenizer from there into"),
        (beside, "model.safetensors stands beside open_clip's weights"),
        (absent, f"it has {CONFIG} and none of {WEIGHTS}"),
        (cut, "no safetensors file, or is cut short"),
        (pickled, "is no plain file of tensors"),
        (with_tensor("text.proj.weight", 32, 32), "text.proj.weight"),
        (with_tensor("visual.head.proj.weight", 32, 32), "its weights have visual.head.proj.weight"),
        (with_tensor("visual.trunk.head.weight", 8, 32), "its weights have visual.trunk.head.weight"),
        (with_tensor("logit_bias", 2), "logit_bias is "),
        (with_tensor("head.weight", 2), "unexpected: head.weight|its weights have head.weight"),
        (with_tensor("logit_scale", 2), "logit_scale is "),
        (without_scale, "its weights have no logit_scale"),
        (absolute, "says 'jina_embeddings_v3', but the weights are named as in XLM-RoBERTa|as open_clip's text tower"),
    ],
    ids=lambda found: getattr(found, "__name__", None),
)
def test_what_its_weights_are_else_is_refused_by_name(damage, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=f"(?s){folder}.*({words})"):
        DualEncoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_one_is_not_pushed(model, tmp_path, capsys):
    open_clip.write(model, tmp_path / "model", "me/model", lambda _: "")
    cut(tmp_path / "model")
    assert main(["push", str(tmp_path / "model"), "me/model"]) == 2
    assert "is cut short" in capsys.readouterr().err
