"""A saved tower comes back the same, here and in timm, and what does not fit is named."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_tower import VisionTower, VisionTowerConfig, WeightsError
from vision_tower.config import as_pair


def test_a_saved_tower_comes_back_the_same(tower, images, tmp_path):
    tower.set_resolution((56, 48))
    images = torch.cat([images, images[:, :, :8]], dim=2)
    tower.save_pretrained(tmp_path / "new" / "tower")
    loaded = VisionTower.from_pretrained(tmp_path / "new" / "tower")
    assert loaded.config == tower.config
    assert torch.equal(loaded(images), tower(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "new")) == ["tower"]
    assert sorted(os.listdir(tmp_path / "new" / "tower")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("resolution", [48, 53, (56, 80)])
def test_timm_loads_a_saved_tower_with_the_same_output(resolution, tower, tmp_path):
    import timm

    tower.set_resolution(resolution)
    tower.save_pretrained(tmp_path)
    model = timm.create_model(
        "eva02_large_patch14_clip_224",
        checkpoint_path=str(tmp_path / "model.safetensors"),
        **tower.config.timm_arguments(),
    )
    images = torch.randn(2, 3, *as_pair(resolution))
    torch.testing.assert_close(tower(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_timm_directory_that_timm_cannot_make_is_named(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for values, match in (
        ({"architecture": "eva03"}, "timm cannot make 'eva03'.*Unknown model"),
        ({"architecture": "eva02_base_patch14_224", "model_args": {"depht": 2}}, "depht"),
        ({"model_type": "jina_clip", "vision_config": [1]}, r"vision_config is \[1\]; expected an object"),
    ):
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"config\.json: .*{match}"):
            VisionTower.from_pretrained(tmp_path)
    tower.save_pretrained(tmp_path)
    timms = ("architecture", "num_classes", "model_args", "pretrained_cfg")
    config.write_text(json.dumps({key: json.loads(config.read_text())[key] for key in timms}))
    with pytest.raises(ValueError, match="unknown vision tower setting depth"):
        VisionTower.from_pretrained(tmp_path, depth=3)


def test_timm_is_not_told_of_a_tower_whose_epsilon_it_does_not_know(make_tower, config, tmp_path):
    with pytest.warns(UserWarning, match=r"layer_norm_eps is 1e-05 and timm always takes 1e-06"):
        make_tower(replace(config, layer_norm_eps=1e-5)).save_pretrained(tmp_path)
    assert "architecture" not in json.loads((tmp_path / "config.json").read_text())
    assert VisionTower.from_pretrained(tmp_path).config.layer_norm_eps == 1e-5


def test_saving_again_replaces_the_tower_and_nothing_else(tower, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    tower.save_pretrained(tmp_path)
    tower.set_resolution(64).save_pretrained(tmp_path)
    assert VisionTower.from_pretrained(tmp_path).config.resolution == 64
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_saved_is_on_disk_before_it_appears(tower, tmp_path, monkeypatch):
    flushed, there = [], []

    def fsync(handle):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        there.append((tmp_path / "tower").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    tower.save_pretrained(tmp_path / "tower")
    assert sorted(flushed[:3]) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert flushed[3:] == [f".tower.{os.getpid()}.partial", tmp_path.name]
    assert there == [False, False, False, False, True]


def test_a_directory_that_calls_the_width_of_the_mlp_hidden_is_read(make_tower, config, images, tmp_path):
    """As earlier versions wrote it: our fields at the top, null for a tower whose mlp_ratio says it."""
    tower = make_tower(replace(config, mlp_width=100))
    tower.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    timms = {key: values[key] for key in ("architecture", "num_classes", "model_args", "pretrained_cfg")}
    values = {"model_type": "trilith_vision_tower", **timms, **values["trilith"]}
    width = values.pop("mlp_width")
    file.write_text(json.dumps({**values, "hidden": width}))
    loaded = VisionTower.from_pretrained(tmp_path)
    assert loaded.config == tower.config
    assert torch.equal(loaded(images), tower(images))
    file.write_text(json.dumps({**values, "hidden": None, "mlp_ratio": 100.5 / 64}))
    assert VisionTower.from_pretrained(tmp_path).config.mlp_width == 100


def test_a_failed_save_leaves_the_old_tower_and_no_litter(tower, tmp_path, monkeypatch):
    path = tmp_path / "tower"
    tower.save_pretrained(path)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vision_tower.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        tower.set_resolution(64).save_pretrained(path)
    assert os.listdir(tmp_path) == ["tower"]
    assert VisionTower.from_pretrained(path).config.resolution == 48


def test_bfloat16_weights_are_read_as_float32_and_checkpointing_may_be_overridden(tower, tmp_path):
    tower.bfloat16().save_pretrained(tmp_path)
    loaded = VisionTower.from_pretrained(tmp_path, checkpointing=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.pos_embed, tower.pos_embed.float())
    assert loaded.config.checkpointing


def test_missing_extra_and_misshaped_weights_are_named(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["neck.weight"] = weights.pop("norm.bias")
    weights["cls_token"] = weights["cls_token"][..., :32].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        VisionTower.from_pretrained(tmp_path)
    for part in (
        "missing: norm.bias",
        "not known: neck.weight",
        "cls_token [1, 1, 32] where [1, 1, 64]",
        "config.json",
    ):
        assert part in str(caught.value)


def test_missing_and_broken_files_are_named(tower, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*save_pretrained"):
        VisionTower.from_pretrained(tmp_path)
    for name in ("eva02_huge", "eva02_large_patch14_clip_224.merged2b_s4b_b131k"):  # a model, and weights, of no name
        with pytest.raises(ValueError, match=rf"timm knows no {name!r} \(.*list_models"):
            VisionTower.from_timm(name, pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"absent does not exist.*from_timm"):
        VisionTower.from_pretrained(tmp_path / "absent")
    tower.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        VisionTower.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for text, match in (
        ("{", "not valid JSON"),
        (json.dumps({"model_type": "bert"}), "trilith_vision_tower"),
        (json.dumps({"model_type": "trilith_vision_tower", "depth": 3}), r"config\.json: unknown .*depth"),
        (json.dumps({"trilith": {"depth": 3}}), r"config\.json: unknown .*depth"),
        (json.dumps({"trilith": {"layers": 2}, "depth": 3}), r"config\.json: depth is not known here"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=match):
            VisionTower.from_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        tower.save_pretrained(config)


TINY = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "name", ["eva02_base_patch16_clip_224", "eva02_large_patch14_clip_336", "eva02_base_patch14_224"]
)
def test_from_timm_has_timms_class_token(name):
    import timm

    torch.manual_seed(0)
    tower = VisionTower.from_timm(name, global_pool="token", **TINY)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **TINY)
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)[:, 0]
    expected = model.fc_norm(features)  # the identity for CLIP models; the only norm of a MIM one
    torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
    assert tower.config.layers == 2


def test_from_timm_is_float32_on_the_cpu_whatever_the_defaults():
    torch.manual_seed(0)
    expected = VisionTower.from_timm("eva02_base_patch16_clip_224", **TINY).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device("meta"):
            found = VisionTower.from_timm("eva02_base_patch16_clip_224", **TINY).state_dict()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_from_timm_changes_the_resolution_of_pretrained_weights_as_eva_does(make_tower, tmp_path):
    tower = make_tower(VisionTowerConfig(resolution=224, patch=16, width=64, layers=2, heads=2))
    tower.save_pretrained(tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    options = {**TINY, "img_size": 96, "pretrained": True, "pretrained_cfg_overlay": overlay}
    loaded = VisionTower.from_timm("eva02_base_patch16_clip_224", **options)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(loaded(images), tower.set_resolution(96)(images), rtol=1e-5, atol=1e-5)


def test_from_timm_refuses_what_is_no_eva02():
    with pytest.raises(ValueError, match=r"vit_tiny.*eva02_base_patch16_clip_224"):
        VisionTower.from_timm("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="eva02_tiny"):
        VisionTower.from_timm("eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match=r"global_pool 'avg', and a VisionTower gives the class token"):
        VisionTower.from_timm("eva02_base_patch14_224", **TINY)
    with pytest.raises(ValueError, match=r"rope_grid_offset=0\.5.*rope\.grid_offset is 0\.5, and there 0\.0"):
        VisionTower.from_timm("eva02_base_patch16_clip_224", rope_grid_offset=0.5, **TINY)
    with pytest.raises(ValueError, match="knows no 'eva03'"):
        VisionTower.from_timm("eva03")
