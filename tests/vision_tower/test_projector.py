"""The projector after a tower: what it computes, what learns, and what a directory keeps of it."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from vision_tower import VisionTower, VisionTowerConfig, WeightsError

SHAPE = {"resolution": 32, "patch": 8, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    tower = VisionTower(VisionTowerConfig(**SHAPE))
    tower.save_pretrained(tmp_path / "plain")
    return tower


@pytest.mark.parametrize("hidden", [0, 40])
def test_a_new_projector_stands_after_weights_without_one_and_is_kept(plain, images, hidden, tmp_path):
    tower = VisionTower.from_pretrained(tmp_path / "plain", projector=24, projector_hidden=hidden)
    assert torch.equal(tower.pooled(images), plain(images))
    found, state = tower(images), tower.state_dict()
    if hidden:
        inner = torch.nn.functional.gelu(plain(images) @ state["projector.0.weight"].T + state["projector.0.bias"])
        expected = inner @ state["projector.2.weight"].T + state["projector.2.bias"]
    else:
        expected = plain(images) @ state["projector.weight"].T + state["projector.bias"]
    torch.testing.assert_close(found, expected)
    assert found.std() > 0.05
    tower.save_pretrained(tmp_path / "out")
    again = VisionTower.from_pretrained(tmp_path / "out")
    assert again.config == tower.config
    assert torch.equal(again(images), found)
    assert torch.equal(tower.merged()(images), found)
    assert again.encode([torch.zeros(3, 40, 40, dtype=torch.uint8)], truncate_dim=20).shape == (1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert tower(images).dtype == torch.float32


def test_folders_of_a_projector_that_a_directory_does_not_state_are_not_read(plain, tmp_path):
    """A tower without one was saved over a tower with one."""
    VisionTower(VisionTowerConfig(**SHAPE, projector=24)).save_pretrained(tmp_path / "out", apart=True)
    left = load_file(tmp_path / "out/1_Dense/model.safetensors")["linear.weight"]
    plain.save_pretrained(tmp_path / "out")
    new = VisionTower.from_pretrained(tmp_path / "out", projector=24)
    assert not torch.equal(new.state_dict()["projector.weight"], left)
    assert torch.isfinite(new.state_dict()["projector.weight"]).all()


@pytest.mark.parametrize("hidden", [0, 40])
def test_apart_it_leaves_a_directory_that_timm_loads(images, hidden, tmp_path):
    tower = VisionTower(VisionTowerConfig(**SHAPE, projector=24, projector_hidden=hidden))
    tower.save_pretrained(tmp_path / "out", apart=True)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), tower.pooled(images))
    for options in ({}, {"projector": 24, "projector_hidden": hidden}):
        again = VisionTower.from_pretrained(tmp_path / "out", **options)
        assert again.config == tower.config
        assert torch.equal(again(images), tower(images))
    with pytest.raises(FileExistsError, match="a projector apart needs a new directory"):
        tower.save_pretrained(tmp_path / "out", apart=True)
    with pytest.raises(WeightsError, match="[12]_Dense is not of the projector"):
        VisionTower.from_pretrained(tmp_path / "out", projector=20)
    (tmp_path / "out/1_Dense/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(WeightsError, match="1_Dense has no weights to read"):
        VisionTower.from_pretrained(tmp_path / "out")


def test_the_projector_alone_learns_and_beside_an_adapter_both(images):
    tower = VisionTower(VisionTowerConfig(**SHAPE, projector=24, lora_rank=2))
    for what, words in (("projector", ("projector",)), ("adapters", ("projector", "lora_"))):
        tower.set_trainable(what).zero_grad()
        tower(images).square().sum().backward()
        learning = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
        assert learning == {name for name, _ in tower.named_parameters() if any(word in name for word in words)}
    assert tower.layer_ids()["projector.weight"] == tower.num_layers


def test_what_cannot_be_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="no projector to train"):
        plain.set_trainable("projector")
    with pytest.raises(ValueError, match="projector_hidden is 8 and projector 0"):
        VisionTowerConfig(**SHAPE, projector_hidden=8)
    with pytest.raises(ValueError, match="projector is -1; expected an integer from 0"):
        VisionTowerConfig(**SHAPE, projector=-1)
    VisionTower.from_pretrained(tmp_path / "plain", projector=24).save_pretrained(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "projector" not in name}, file)
    with pytest.raises(WeightsError, match="lacks the projector that its config.json states"):
        VisionTower.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "projector" not in config["trilith"]  # of a tower without one, directories are as they were
