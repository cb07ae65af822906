"""The model as one: its directory, its temperatures, what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from text_tower import TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig


def make_model(width=16, text_width=16, **options):
    torch.manual_seed(0)
    text = TextTowerConfig(vocab_size=50, width=text_width, layers=1, heads=2, mlp_width=32)
    vision = VisionTowerConfig(resolution=16, patch=8, width=width, layers=1, heads=2, mlp_width=24)
    return DualEncoder(TextTower(text), VisionTower(vision), **options)


@pytest.fixture
def saved(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dims", [None, (16, 8)])
def test_a_model_comes_back_bit_for_bit_with_both_temperatures(tmp_path, dims):
    model = make_model(matryoshka_dims=dims)
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
        model.text_logit_scale.fill_(2.5)
    model.save_pretrained(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"model"}
    back = DualEncoder.from_pretrained(tmp_path / "model")
    assert back.matryoshka_dims == dims
    assert (back.logit_scale.item(), back.text_logit_scale.item()) == (1.25, 2.5)
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    assert np.array_equal(back.encode_image([image], truncate_dim=8), model.vision.encode([image], truncate_dim=8))
    assert back.encode_image([image]).shape == (1, 16)


def test_biases_of_a_sigmoid_loss_come_back_and_a_model_without_says_nothing_of_them(saved, tmp_path):
    model = make_model()
    model.set_biases((-9.5, -3.25))
    model.save_pretrained(tmp_path / "sigmoid")
    back = DualEncoder.from_pretrained(tmp_path / "sigmoid")
    assert (back.logit_bias.item(), back.text_logit_bias.item()) == (-9.5, -3.25)
    assert back.logit_bias.shape == (1,)
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert "bias" not in (saved / "config.json").read_text()
    assert DualEncoder.from_pretrained(saved).logit_bias is None
    for entries in ({"logit_bias": "1"}, {"text_logit_bias": None}, {"logit_bias": 1e9}):
        change(tmp_path / "sigmoid/config.json", **{"logit_bias": 0, "text_logit_bias": 0, **entries})
        with pytest.raises(UserError, match="expected a sigmoid loss's bias, a number from -1000 to 1000"):
            DualEncoder.from_pretrained(tmp_path / "sigmoid")


def test_temperatures_start_at_what_the_paper_says_and_learn():
    for temperature, options in ((0.07, {}), (0.5, {"temperature": 0.5})):
        model = make_model(**options)
        for scale in (model.logit_scale, model.text_logit_scale):
            assert scale.requires_grad
            assert scale.shape == (1,)
            assert torch.exp(-scale).item() == pytest.approx(temperature, rel=1e-6)


def test_towers_of_different_widths_are_refused():
    with pytest.raises(UserError, match="text tower have 32 numbers and those of the vision tower 16"):
        make_model(text_width=32)


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "config.json").unlink(), "holds no model: there is no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda p: (p / "config.json").write_text("[1]"), r"has format \[1\]; expected"),
        (lambda p: (p / "config.json").write_text("{}"), "has format None; expected"),
        (lambda p: change(p / "config.json", format="other"), "has format 'other'; expected"),
        (lambda p: shutil.rmtree(p / "text"), "cannot load .*model: .*text"),
        (lambda p: shutil.rmtree(p / "vision"), "cannot load .*model: .*vision"),
        (lambda p: (p / "text/config.json").write_text("{"), "cannot load .*model: .*text"),
        (lambda p: (p / "vision/model.safetensors").write_bytes(b"x"), "cannot load .*model: .*vision"),
    ],
)
def test_a_directory_that_is_no_model_is_one_message(saved, damage, words):
    damage(saved)
    with pytest.raises(UserError, match=words):
        DualEncoder.from_pretrained(saved)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(UserError, match="holds no model"):
        DualEncoder.from_pretrained(tmp_path / "model")


def test_options_reach_the_tower_that_they_are_for(saved):
    model = DualEncoder.from_pretrained(saved, text={"max_length": 99}, vision={"checkpointing": True})
    assert (model.text.config.max_length, model.text.config.checkpointing) == (99, False)
    assert model.vision.config.checkpointing
