"""A timm directory says more than its weights: what its files say of the model and of the images is followed, to timm's
own numbers, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vision_tower import VisionTower

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def timms(directory: Path, image: Image.Image) -> np.ndarray:
    """timm's own pipeline for a directory."""
    import timm
    from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode

    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    for step in transform.transforms:
        if isinstance(step, ResizeKeepRatio):  # timm below 1.0.31 forgets it before a centre crop that is no square
            step.interpolation = str_to_interp_mode(config["interpolation"])
    with torch.no_grad():
        return model(transform(image)[None]).numpy()


PREPROCESSING = [
    {},
    IMAGENET,
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    {"mean": ..., "std": ..., "crop_pct": ..., "interpolation": ...},  # timm's defaults, which are not CLIP's
    {"crop_pct": 0.875},
    {"crop_pct": 0.9, "interpolation": "bilinear"},
    {"crop_pct": 0.77, "crop_mode": "squash", "interpolation": "lanczos"},
    {"crop_mode": "squash"},
    {"crop_mode": "border"},
    {"crop_mode": "border", "crop_pct": 0.9, "interpolation": "nearest", **IMAGENET},
]


@pytest.mark.parametrize("sides", [32, (32, 48)])
@pytest.mark.parametrize("changes", PREPROCESSING, ids=lambda changes: ",".join(changes) or "CLIP's")
def test_a_timm_directorys_preprocessing_gives_timms_embedding_and_survives_a_round_trip(
    changes, sides, write_timm, noise_image, tmp_path
):
    directory = write_timm({"img_size": sides}, changes)
    expected = timms(directory, noise_image)
    tower = VisionTower.from_pretrained(directory)
    np.testing.assert_allclose(tower.encode([noise_image], normalize=False), expected, rtol=0, atol=2e-5)
    tower.save_pretrained(tmp_path / "again")
    assert VisionTower.from_pretrained(tmp_path / "again").config == tower.config
    np.testing.assert_allclose(timms(tmp_path / "again", noise_image), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ref_feat_shape": 5},
        {"ref_feat_shape": [7, 7]},
        {"ref_feat_shape": None},
        {"rope_temperature": 100.0},
        {"img_size": [24, 40]},
        {"scale_attn_inner": False},
        {"swiglu_align_to": 16},
        {"use_fc_norm": True},
        {"dynamic_img_size": True},
        {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "patch_drop_rate": 0.5, "head_init_scale": 1.0},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_model_args_say_is_followed(arguments, write_timm, noise_image):
    directory = write_timm(arguments)
    expected = timms(directory, noise_image)
    found = VisionTower.from_pretrained(directory).encode([noise_image], normalize=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


REFUSED_ARGUMENTS = {
    "num_classes": (5, r"num_classes 5.*no head \(0\); state num_classes=0"),
    "global_pool": ("avg", r"global_pool 'avg'.*class token \('token'\)"),
    "rope_type": ("dinov3", "RotaryEmbeddingDinoV3.*RotaryEmbeddingCat"),
    "rope_grid_offset": (0.5, r"grid_offset is 0\.5, and there 0\.0"),
    "rope_grid_indexing": ("xy", "grid_indexing is 'xy', and there 'ij'"),
    "rope_rotate_half": (True, "rotate_half is True, and there False"),
    "rope_shift_coords": (0.1, r"shift_coords is 0\.1|unexpected keyword argument 'rope_shift_coords'"),
    "ref_feat_shape": ([3, 4], r"reference grid of \(3, 4\)"),
    "dynamic_img_pad": (True, "dynamic_img_pad is True, and there False"),
    "num_reg_tokens": (2, "num_prefix_tokens is 3, and there 1"),
    "class_token": (False, "class_token=False|Token pooling needs the class token"),
    "no_embed_class": (True, "no_embed_class is True"),
    "use_abs_pos_emb": (False, "pos_embed is None"),
    "use_rot_pos_emb": (False, "use_rot_pos_emb=False"),
    "init_values": (0.1, r"init_values=0\.1.*gamma_1"),
    "qkv_fused": (True, "qkv_fused=True"),
    "qkv_bias": (False, r"q_proj\.bias is None"),
    "scale_mlp": (False, "mlp is 'GluMlp', and there 'SwiGLU'"),
    "swiglu_mlp": (False, "mlp is 'Mlp', and there 'SwiGLU'"),
    "qk_norm": (True, "k_norm is 'LayerNorm'|unexpected keyword argument 'qk_norm'"),
    "attn_type": ("rope", "attn is 'AttentionRope', and there 'EvaAttention'"),
    "use_post_norm": (True, "use_post_norm=True"),
    "use_pre_transformer_norm": (True, "norm_pre is 'LayerNorm'"),
    "use_post_transformer_norm": (False, r"final norms are \[\]"),
    "in_chans": (1, "in_chans is 1, and there 3"),
    "rope_mixed_mode": (True, "do not take rope_mixed_mode"),
    "checkpoint_path": ("/etc/hostname", "do not take checkpoint_path"),
    "pretrained": (True, "do not take pretrained"),
    "features_only": (True, "do not take features_only"),
    "device": ("cpu", "do not take device"),
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_a_timm_model_that_is_no_tower_is_refused_with_both_values(name, write_timm):
    value, match = REFUSED_ARGUMENTS[name]
    directory = write_timm()
    config = directory / "config.json"
    values = json.loads(config.read_text())
    values["model_args"][name] = value
    if name == "dynamic_img_pad":
        values["model_args"]["dynamic_img_size"] = True
    if name in ("global_pool", "num_classes"):
        del values[name]
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: (?s:.*)(?:{match})"):
        VisionTower.from_pretrained(directory)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"global_pool": "avg"}, "global_pool is 'avg', and its model_args make a model of 'token'"),
        ({"num_classes": 7}, "num_classes is 7, and its model_args make a model of 0|has num_classes 7, the outputs"),
        ({"num_features": 64}, "num_features is 64.*32"),
        ({"do_pooling": False}, "do_pooling is False"),
        ({"normalise_twice": True}, "normalise_twice is not known here"),
        (
            {"pretrained_cfg": {"input_size": [3, 48, 48]}},
            r"input_size is \[3, 48, 48\], and the model takes \[3, 32, 32\]",
        ),
        ({"pretrained_cfg": {"crop_mode": "random"}}, "crop_mode is 'random'; expected one of center"),
        ({"pretrained_cfg": {"crop_pct": 1.2}}, r"crop_pct is 1\.2"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "interpolation is 'random'; expected one of nearest"),
        ({"pretrained_cfg": {"mean": [123.7, 116.3, 103.5]}}, r"mean is \[123\.7, .*within 0 … 1"),
        ({"pretrained_cfg": {"std": [0.5, 0.5, 0.0]}}, "std is"),
        ({"pretrained_cfg": {"pixel_scale": 2}}, "pixel_scale"),
        ({"architecture": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"architecture": "hf-hub:timm/eva02"}, "Unknown model"),
    ],
)
def test_what_a_timm_directory_says_else_is_refused_by_name(changes, match, write_timm):
    directory = write_timm(**changes)
    with pytest.raises(ValueError, match=rf"config\.json: (?s:.*)(?:{match})"):
        VisionTower.from_pretrained(directory)


def test_a_head_goes_and_preprocessing_changes_only_where_that_is_stated(write_timm, noise_image):
    directory = write_timm({"num_classes": 7}, IMAGENET)
    tower = VisionTower.from_pretrained(directory, num_classes=0, crop_mode="squash")
    assert (tower.config.mean, tower.config.crop_mode) == (tuple(IMAGENET["mean"]), "squash")
    for options in ({"num_classes": 7}, {"global_pool": "avg"}):
        for source in (directory, directory / "model.safetensors"):
            with pytest.raises(ValueError, match=f"{next(iter(options))} is .*can only have"):
                VisionTower.from_pretrained(source, **options)


def test_a_saved_directory_that_tells_timm_otherwise_is_refused(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    values["pretrained_cfg"]["mean"] = IMAGENET["mean"]
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"pretrained_cfg: mean is \(0\.485, .*, and the tower's \(0\.48145466, "):
        VisionTower.from_pretrained(tmp_path)
    assert VisionTower.from_pretrained(tmp_path, mean=IMAGENET["mean"]).config.mean == tuple(IMAGENET["mean"])
    # What was saved before a tower had a preprocessing of its own was CLIP's.
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        del values["trilith"][key], values["pretrained_cfg"][key]
    config.write_text(json.dumps(values))
    assert VisionTower.from_pretrained(tmp_path).config == tower.config
