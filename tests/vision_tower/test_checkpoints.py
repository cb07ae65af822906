"""Towers that other projects wrote come out with timm's numbers, and nothing in a file can run."""

import json
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vision_tower import VisionTower, VisionTowerConfig, WeightsError

# timm's names in EVA's words (the table of EVA-CLIP's own modules, not the package's).
EVA = {
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.fc2.": "mlp.w3.",
    "attn.q_proj.bias": "attn.q_bias",
    "attn.v_proj.bias": "attn.v_bias",
}


def eva_rotary(grid: int, pretrained: int, head_dim: int) -> torch.Tensor:
    """EVA's table of angles, `[grid * grid, head_dim]`: position / grid * pretrained, each angle twice."""
    frequencies = 1.0 / (10000 ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)))
    angles = torch.outer(torch.arange(grid) / grid * pretrained, frequencies).repeat_interleave(2, dim=1)
    rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def eva_names(tower: VisionTower, prefix: str = "", rotary: int | None = None) -> dict[str, torch.Tensor]:
    weights = {}
    for key, value in tower.state_dict().items():
        for ours, theirs in EVA.items():
            key = key.replace(ours, theirs)
        weights[prefix + key] = value.clone()
    if rotary:
        angles = eva_rotary(tower.config.grid[0], rotary, tower.config.head_dim)
        for owner in ("rope", *(f"blocks.{i}.attn.rope" for i in range(tower.config.layers))):
            weights[f"{prefix}{owner}.freqs_cos"], weights[f"{prefix}{owner}.freqs_sin"] = angles.cos(), angles.sin()
    return weights


@pytest.fixture
def wide(make_tower) -> VisionTower:
    """Two heads of 64, as EVA's heads are, and the usual reference grid."""
    return make_tower(VisionTowerConfig(resolution=48, patch=8, width=128, layers=2, heads=2, mlp_width=100))


def same(loaded: VisionTower, tower: VisionTower) -> None:
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    assert loaded.config == tower.config
    assert torch.equal(loaded(images), tower(images))


def write_clip(tower: VisionTower, folder: Path) -> Path:
    """An EVA-CLIP checkpoint: image half with a head to 768, text half, temperature."""
    weights = eva_names(tower, "visual.", rotary=16)
    weights |= {"visual.head.weight": torch.zeros(768, tower.config.width), "visual.head.bias": torch.zeros(768)}
    weights |= {"logit_scale": torch.ones([]), "text.transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    path = folder / "EVA02_CLIP_L_psz14_s4B.pt"
    torch.save(weights, path)
    return path


@pytest.fixture
def clip_file(wide, tmp_path):
    return write_clip(wide, tmp_path)


def test_an_eva_clip_file_gives_the_same_tower(wide, clip_file):
    same(VisionTower.from_pretrained(clip_file), wide)


@pytest.mark.parametrize("resolution", [224, 384, 512])
def test_an_eva_clip_file_equals_timms_own_reading_in_output_and_gradients(make_tower, resolution, tmp_path):
    import timm
    from timm.models.eva import checkpoint_filter_fn

    settings = {"patch": 14, "width": 64, "layers": 2, "heads": 1}
    clip_file = write_clip(make_tower(VisionTowerConfig(resolution=resolution // 14 * 14, **settings)), tmp_path)
    tower = VisionTower.from_pretrained(clip_file, resolution=resolution)
    model = timm.create_model("eva02_large_patch14_clip_224", **tower.config.timm_arguments())
    converted = checkpoint_filter_fn(torch.load(clip_file, weights_only=True), model)
    model.load_state_dict({key: value for key, value in converted.items() if not key.startswith("head.")})
    images = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(2))
    ours, theirs = tower(images), model(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (key, parameter), (name, reference) in zip(tower.named_parameters(), model.named_parameters(), strict=True):
        assert key == name
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=0, atol=1e-5 * reference.grad.abs().max())


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_a_mim_file_gives_the_same_tower(make_tower, tmp_path, wrapper):
    """Trainer's wrapping, a mask token and a prediction head; no norm inside attention."""
    config = VisionTowerConfig(
        resolution=48, patch=8, width=128, layers=2, heads=2, mlp_width=100, attention_norm=False
    )
    tower = make_tower(config)
    weights = eva_names(tower, rotary=16)
    weights |= {
        "mask_token": torch.zeros(1, 1, 128),
        "lm_head.weight": torch.zeros(9, 128),
        "lm_head.bias": torch.ones(9),
    }
    path = tmp_path / "EVA02_L_psz14.pt"
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    same(VisionTower.from_pretrained(path, heads=2), tower)


def test_a_mim_tower_that_averages_patches_gives_its_norm_to_the_class_token(make_tower, tmp_path):
    tower = make_tower(
        VisionTowerConfig(resolution=48, patch=8, width=128, layers=2, heads=2, mlp_width=100, attention_norm=False)
    )
    weights = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value
               for key, value in eva_names(tower).items()}  # fmt: skip
    for i in range(2):  # and its queries, keys and values may be one
        parts = [weights.pop(f"blocks.{i}.attn.{part}_proj.weight") for part in "qkv"]
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
    torch.save(weights, tmp_path / "mim.pt")
    same(VisionTower.from_pretrained(tmp_path / "mim.pt", global_pool="token"), tower)
    with pytest.raises(WeightsError, match=r"mim\.pt has fc_norm.*averages its patches.*global_pool='token'"):
        VisionTower.from_pretrained(tmp_path / "mim.pt")
    torch.save(weights | eva_names(tower), tmp_path / "both.pt")
    with pytest.raises(WeightsError, match="two final norms, norm and fc_norm"):
        VisionTower.from_pretrained(tmp_path / "both.pt", global_pool="token")


def test_an_open_clip_checkpoint_gives_the_same_tower(wide, tmp_path):
    weights = {"visual.trunk." + key: value for key, value in wide.state_dict().items()}
    weights |= {"visual.trunk.head.weight": torch.zeros(512, 128), "visual.trunk.head.bias": torch.zeros(512)}
    weights |= {"logit_scale": torch.ones([]), "text.token_embedding.weight": torch.ones(8, 4)}
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "epoch_1.pt")
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    for path in (tmp_path / "epoch_1.pt", tmp_path / "open_clip_model.safetensors", tmp_path):
        same(VisionTower.from_pretrained(path), wide)


def test_open_clips_own_eva02_has_the_names_that_are_read():
    import open_clip
    from vision_tower.checkpoints import to_timm_names

    with torch.device("meta"):
        clip = open_clip.create_model("EVA02-B-16", pretrained_image=False, device="meta")
        expected = VisionTower(VisionTowerConfig.eva02_base()).state_dict()
    prefix = "visual.trunk."
    trunk = {k.removeprefix(prefix): v for k, v in clip.state_dict().items() if k.startswith(prefix)}
    found = to_timm_names(trunk)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}


def jina_directory(tower: VisionTower, path, pixels: int, kind: str) -> None:
    """The published layout: EVA's names in `vision_model.`, a text half, one temperature."""
    weights = eva_names(tower, "vision_model.")
    weights |= {"logit_scale": torch.tensor(2.6592), "text_model.transformer.roberta.emb_ln.weight": torch.ones(4)}
    vision = {"embed_dim": 128, "width": 128, "head_width": 64, "image_size": pixels, "patch_size": 8, "layers": 2}
    vision |= {"intp_freq": True, "pt_hw_seq_len": 16, "subln": True, "naive_swiglu": True, "rope_embeddings": True}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "jina_clip", "vision_config": vision}))
    if kind == "safetensors":
        save_file(weights, path / "model.safetensors")
    else:
        torch.save(weights, path / "pytorch_model.bin")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_jina_clip_v2s_image_half_comes_out_of_its_whole_file_with_its_licence(make_tower, tmp_path, kind):
    tower = make_tower(VisionTowerConfig(resolution=50, patch=8, width=128, layers=2, heads=2, mlp_width=100))
    jina_directory(tower, tmp_path / "jina-clip-v2", 50, kind)
    with pytest.warns(UserWarning, match="CC-BY-NC-4.0"):
        loaded = VisionTower.from_pretrained(tmp_path / "jina-clip-v2")
    assert loaded.config == tower.config  # with the two pixels that its position table cannot tell
    images = torch.randn(2, 3, 50, 50)
    assert torch.equal(loaded(images), tower(images))
    with pytest.warns(UserWarning, match="CC-BY-NC-4.0"):
        smaller = VisionTower.from_pretrained(tmp_path / "jina-clip-v2", resolution=32)
    torch.testing.assert_close(smaller(images[..., :32, :32]), tower.set_resolution(32)(images[..., :32, :32]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "pretrained"), [(6, 16), (6, 6), (24, 16), (4, 16), (2, 16), (78, 16), (16, 24)])
def test_evas_rotary_table_tells_heads_and_reference_grid(make_tower, tmp_path, grid, pretrained, dtype):
    config = VisionTowerConfig(
        resolution=grid * 8, patch=8, width=64, layers=1, heads=2, mlp_width=80, reference_grid=pretrained
    )
    tower = make_tower(config)
    weights = eva_names(tower, "visual.", rotary=pretrained)
    torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "eva.pt")
    loaded = VisionTower.from_pretrained(tmp_path / "eva.pt")
    assert loaded.config == config
    # and the table itself is ours
    from vision_tower.positions import rotary_table

    table = rotary_table((grid, grid), 32, reference=pretrained, theta=10_000.0)[1:]
    angles = eva_rotary(grid, pretrained, 32)
    torch.testing.assert_close(table.repeat_interleave(2, dim=1)[..., 0], angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(table.repeat_interleave(2, dim=1)[..., 1], angles.sin(), rtol=0, atol=1e-5)


def test_a_rotary_table_of_another_theta_is_refused_until_it_is_stated(wide, tmp_path):
    weights = eva_names(wide, rotary=16)
    weights["rope.freqs_cos"] = (torch.arange(36 * 64).reshape(36, 64) / 7).cos()
    torch.save(weights, tmp_path / "eva.pt")
    with pytest.raises(WeightsError, match=r"eva\.pt has a rotary table.*theta 10000; state rope_theta"):
        VisionTower.from_pretrained(tmp_path / "eva.pt")
    assert VisionTower.from_pretrained(tmp_path / "eva.pt", rope_theta=100, reference_grid=6).config.heads == 2


def test_stated_settings_win_over_inferred_ones(wide, tmp_path):
    torch.save(eva_names(wide), tmp_path / "eva.pt")
    loaded = VisionTower.from_pretrained(
        tmp_path / "eva.pt", heads=4, reference_grid=None, checkpointing=True, attention="auto", resolution=(64, 48)
    )
    assert (loaded.config.heads, loaded.config.reference_grid) == (4, None)
    assert (loaded.config.checkpointing, loaded.config.attention) == (True, "auto")
    assert loaded.config.grid == (8, 6)
    with pytest.raises(ValueError, match="unknown vision tower setting depth"):
        VisionTower.from_pretrained(tmp_path / "eva.pt", depth=3)


def test_half_precision_and_old_pickles_are_read(wide, tmp_path):
    torch.save(eva_names(wide), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    same(VisionTower.from_pretrained(tmp_path / "old.pt"), wide)
    torch.save({key: value.half() for key, value in eva_names(wide).items()}, tmp_path / "half.pt")
    assert VisionTower.from_pretrained(tmp_path / "half.pt").pos_embed.dtype == torch.float32


@pytest.mark.parametrize("name", ["eva02_large_patch14_clip_224", "eva02_base_patch14_224"])
def test_a_timm_directory_is_read(name, tmp_path):
    import timm

    arguments = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=3, **arguments)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": name, "num_classes": 3, "model_args": arguments, "pretrained_cfg": {}})
    )
    tower = VisionTower.from_pretrained(tmp_path, checkpointing=True, num_classes=0, global_pool="token")
    images = torch.randn(2, 3, 64, 64)
    norm = model.fc_norm if "fc_norm.weight" in model.state_dict() else torch.nn.Identity()
    expected = norm(model.forward_features(images)[:, 0])
    torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
    assert tower.config.checkpointing


@pytest.mark.parametrize("resolution", [48, (56, 80)])
def test_a_saved_directory_is_a_timm_directory(wide, resolution, tmp_path):
    import timm

    wide.set_resolution(resolution).save_pretrained(tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    height, width = wide.config.grid[0] * 8, wide.config.grid[1] * 8
    images = torch.randn(2, 3, height, width)
    torch.testing.assert_close(model(images), wide(images), rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, height, width)
    assert data["interpolation"] == "bicubic"
    assert data["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_could_run_code_is_refused_and_nothing_runs(wide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.pt", {"model": eva_names(wide), "args": Bomb()}), ("b.pt", Bomb())):
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=rf"{name} is not a file of tensors alone.*safetensors"):
            VisionTower.from_pretrained(tmp_path / name)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match=r"c\.pt"):
        VisionTower.from_pretrained(tmp_path / "c.pt")
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_image_tower_is_named(wide, clip_file, tmp_path):
    whole = clip_file.read_bytes()
    clip_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"EVA02_CLIP_L_psz14_s4B\.pt cannot be read"):
        VisionTower.from_pretrained(clip_file)
    for content, match in (
        ({"text.weight": torch.ones(3)}, r"0 image towers.*'text\.weight'"),
        (eva_names(wide, "a.") | eva_names(wide, "b."), r"2 image towers.*'a\.', 'b\.'"),
        ([1, 2], "holds a list"),
        ({"patch_embed.proj.weight": torch.ones(8, 3, 4, 4)}, r"no EVA02 tower: 'pos_embed'"),
    ):
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(WeightsError, match=rf"wrong\.pt.*{match}"):
            VisionTower.from_pretrained(tmp_path / "wrong.pt")


def test_a_table_that_is_no_square_asks_for_its_resolution(make_tower, tmp_path):
    tower = make_tower(VisionTowerConfig(resolution=(40, 56), patch=8, width=64, layers=1, heads=1))
    torch.save(eva_names(tower), tmp_path / "page.pt")
    with pytest.raises(WeightsError, match=r"page\.pt has positions for 35 patches of 8.*resolution=\(height, width\)"):
        VisionTower.from_pretrained(tmp_path / "page.pt")
    loaded = VisionTower.from_pretrained(tmp_path / "page.pt", resolution=(40, 56))
    assert loaded.config.grid == (5, 7)
    assert torch.equal(loaded.pos_embed, tower.pos_embed)


def test_a_checkpoint_of_another_width_is_named_with_both_shapes(wide, make_tower, tmp_path):
    wide.save_pretrained(tmp_path)
    other = make_tower(VisionTowerConfig(resolution=48, patch=8, width=64, layers=2, heads=2))
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors does not fit a tower of width 128.*64.*is needed"):
        VisionTower.from_pretrained(tmp_path)


def test_a_jina_config_that_contradicts_its_weights_is_named(wide, tmp_path):
    jina_directory(wide, tmp_path / "jina", 48, "safetensors")
    config = tmp_path / "jina" / "config.json"
    values = json.loads(config.read_text())
    for wrong, match in (
        ({"width": 256, "embed_dim": 256}, "does not fit a tower of width 256"),
        ({"layers": 3}, r"missing: blocks\.2"),
        ({"image_size": 512}, r"positions for 6x6 patches of 8, and its config\.json an image_size of 512"),
        ({"width": None}, r"config\.json: vision_config's width is None"),
        ({"head_width": 48}, r"config\.json: width 128 is no multiple of head_width 48"),
    ):
        config.write_text(json.dumps({**values, "vision_config": {**values["vision_config"], **wrong}}))
        with pytest.warns(UserWarning, match="CC-BY"), pytest.raises(ValueError, match=match):
            VisionTower.from_pretrained(tmp_path / "jina")


def test_loading_warns_of_a_licence_only_for_jinas_weights(wide, clip_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VisionTower.from_pretrained(clip_file)


def test_a_loaded_tower_owns_its_memory(wide, clip_file):
    """Training it must not write into the file that it came from, nor depend on that file."""
    tower = VisionTower.from_pretrained(clip_file)
    before = clip_file.read_bytes()
    with torch.no_grad():
        tower.pos_embed.add_(1)
    assert clip_file.read_bytes() == before
    clip_file.write_bytes(b"")
    assert math.isclose((tower.pos_embed - wide.pos_embed).mean().item(), 1, abs_tol=1e-5)
