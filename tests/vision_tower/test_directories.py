"""A directory says more than its weights: what its files say of the model and of the images is followed, to the
numbers of the project that wrote it, or refused by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from vision_tower import VisionTower, VisionTowerConfig
from vision_tower.foreign import processor_settings

NAME = "eva02_base_patch16_clip_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            middle = 0.0 if parameter.ndim > 1 else 0.5
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 70, 3), dtype=np.uint8))


@pytest.fixture
def write_timm(tmp_path) -> Callable[..., Path]:
    def write(
        model_args: dict[str, Any] | None = None, pretrained_cfg: dict[str, Any] | None = None, **top: Any
    ) -> Path:
        """A directory as timm's own `save_for_hf` writes it, with weights that it loads, and with changes."""
        import timm
        from timm.models import save_for_hf

        arguments = {**SMALL, **(model_args or {})}
        known = {key: value for key, value in arguments.items() if value is not None}
        model = randomized(timm.create_model(NAME, **{"num_classes": 0, **known}))
        sides = arguments["img_size"]
        sides = [sides, sides] if isinstance(sides, int) else list(sides)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *sides), "crop_pct": 1.0}
        model.pretrained_cfg["num_classes"] = model.num_classes
        save_for_hf(model, tmp_path, model_args=known)
        config = tmp_path / "config.json"
        values = json.loads(config.read_text())
        values["model_args"] = {**values["model_args"], **arguments}
        for key, value in (pretrained_cfg or {}).items():
            values["pretrained_cfg"][key] = value
            if value is ...:
                del values["pretrained_cfg"][key]
        config.write_text(json.dumps({**values, **top}))
        return tmp_path

    return write


def timms(directory: Path, image: Image.Image) -> np.ndarray:
    """timm's own pipeline for a directory."""
    import timm

    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
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
    changes, sides, write_timm, noise, tmp_path
):
    directory = write_timm({"img_size": sides}, changes)
    expected = timms(directory, noise)
    tower = VisionTower.from_pretrained(directory)
    np.testing.assert_allclose(tower.encode([noise], normalize=False), expected, rtol=0, atol=2e-5)
    tower.save_pretrained(tmp_path / "again")
    assert VisionTower.from_pretrained(tmp_path / "again").config == tower.config
    np.testing.assert_allclose(timms(tmp_path / "again", noise), expected, rtol=0, atol=2e-5)


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
def test_what_model_args_say_is_followed(arguments, write_timm, noise):
    directory = write_timm(arguments)
    expected = timms(directory, noise)
    found = VisionTower.from_pretrained(directory).encode([noise], normalize=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


REFUSED_ARGUMENTS = {
    "num_classes": (5, r"num_classes 5.*no head \(0\); state num_classes=0"),
    "global_pool": ("avg", r"global_pool 'avg'.*class token \('token'\)"),
    "rope_type": ("dinov3", "RotaryEmbeddingDinoV3.*RotaryEmbeddingCat"),
    "rope_grid_offset": (0.5, r"grid_offset is 0\.5, and there 0\.0"),
    "rope_grid_indexing": ("xy", "grid_indexing is 'xy', and there 'ij'"),
    "rope_rotate_half": (True, "rotate_half is True, and there False"),
    "rope_shift_coords": (0.1, r"shift_coords is 0\.1"),
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
    "qk_norm": (True, "k_norm is 'LayerNorm'"),
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
    with pytest.raises(ValueError, match=rf"config\.json: (?s:.*){match}"):
        VisionTower.from_pretrained(directory)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"global_pool": "avg"}, "global_pool is 'avg', and its model_args make a model of 'token'"),
        ({"num_classes": 7}, "num_classes is 7, and its model_args make a model of 0"),
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
    with pytest.raises(ValueError, match=rf"config\.json: (?s:.*){match}"):
        VisionTower.from_pretrained(directory)


def test_a_head_goes_and_preprocessing_changes_only_where_that_is_stated(write_timm, noise):
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
        del values[key], values["pretrained_cfg"][key]
    config.write_text(json.dumps(values))
    assert VisionTower.from_pretrained(tmp_path).config == tower.config


JINA_VISION = {
    "model_type": "jina_clip_vision", "embed_dim": 32, "width": 32, "layers": 2, "head_width": 16, "image_size": 32,
    "patch_size": 8, "mlp_ratio": 2.6667, "patch_dropout": 0.1, "fused_layer_norm": False, "intp_freq": True,
    "pt_hw_seq_len": 16, "rope_embeddings": True, "subln": True, "naive_swiglu": True, "qkv_bias": True,
    "x_attention": True, "post_norm": False, "ls_init_value": None, "proj_type": None,
}  # fmt: skip
# As published with jina-clip-v2.
PROCESSOR = {
    "auto_map": {"AutoImageProcessor": "processing_clip.JinaCLIPImageProcessor"},
    "image_processor_type": "JinaCLIPImageProcessor", "processor_class": "JinaCLIPProcessor", "size": 32,
    "resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0, "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


@pytest.fixture
def write_jina(tmp_path, make_tower) -> Callable[..., Path]:
    def write(vision: dict[str, Any] | None = None, processor: dict[str, Any] | None = None, **top: Any) -> Path:
        tower = make_tower(VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2))
        save_file(
            {f"vision_model.{key}": value for key, value in tower.state_dict().items()}, tmp_path / "model.safetensors"
        )
        said = {key: value for key, value in {**JINA_VISION, **(vision or {})}.items() if value is not ...}
        values = {"model_type": "jina_clip", "add_projections": False, "truncate_dim": None, "projection_dim": 32,
                  "text_config": {}, "vision_config": said, **top}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(values))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **(processor or {})}))
        return tmp_path

    return write


def test_a_jina_directory_as_published_is_followed(write_jina):
    config = VisionTower.from_pretrained(write_jina()).config
    assert config == VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2, hidden=85)
    for unscaled in ({"intp_freq": False, "pt_hw_seq_len": 4}, {"intp_freq": ..., "pt_hw_seq_len": 4}):
        assert VisionTower.from_pretrained(write_jina(unscaled)).config.reference_grid is None


# Of fast image processors.
FAST = {
    "data_format": "channels_first", "default_to_square": False, "device": None, "disable_grouping": None,
    "input_data_format": None, "return_tensors": None, "size_divisor": None, "do_pad": None, "pad_size": None,
    "crop_style": None,
}  # fmt: skip


def test_what_later_versions_add_to_a_jina_directory_has_no_bearing_on_it(write_jina):
    written = write_jina({"drop_path_rate": 0.1, "later": None}, {**FAST, "do_pad": False}, later=None)
    expected = VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2, hidden=85)
    assert VisionTower.from_pretrained(written).config == expected


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_jina_processor_gives_torchvisions_pixels(mode, write_jina, noise):
    from torchvision.transforms import v2

    statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    directory = write_jina(None, {"resize_mode": mode, "interpolation": "bilinear", **statistics})
    tower = VisionTower.from_pretrained(directory)
    size = [32, 32] if mode == "squash" else 32
    steps = [v2.Resize(size, v2.InterpolationMode.BILINEAR), v2.CenterCrop(32), v2.PILToTensor()]
    pixels = v2.Compose(steps)(noise)
    assert torch.equal(tower.preprocess(noise), pixels)
    expected = v2.functional.normalize(pixels.float() / 255, **statistics)
    torch.testing.assert_close(tower.normalize(pixels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("vision", "processor", "top", "match"),
    [
        ({"rope_embeddings": False}, {}, {}, "vision_config has rope_embeddings False, and .* True"),
        ({"naive_swiglu": False}, {}, {}, "naive_swiglu False"),
        # What their code has where the file does not say it.
        ({"rope_embeddings": ...}, {}, {}, "vision_config has rope_embeddings False, and .* True"),
        ({"naive_swiglu": ...}, {}, {}, "naive_swiglu False"),
        ({"naive_swiglu": None}, {}, {}, "naive_swiglu False"),
        ({"subln": ...}, {}, {}, "attn.norm"),
        ({"intp_freq": ...}, {}, {}, "pt_hw_seq_len is 16 and intp_freq False"),
        ({}, {"do_pad": True}, {}, "do_pad True"),
        ({}, {"do_resize": None}, {}, "do_resize None"),
        ({"post_norm": True}, {}, {}, "post_norm True, and .* False"),
        ({"ls_init_value": 0.1}, {}, {}, r"ls_init_value 0\.1"),
        ({"proj_type": "linear"}, {}, {}, "proj_type 'linear', and .* None"),
        ({"qkv_bias": False}, {}, {}, "qkv_bias False"),
        ({"embed_dim": 64}, {}, {}, "embed_dim is 64 and its width 32"),
        ({"mlp_ratio": 4.0}, {}, {}, "does not fit"),
        ({"subln": False}, {}, {}, "attn.norm"),
        ({"head_width": 12}, {}, {}, "no multiple of head_width 12"),
        ({"pt_hw_seq_len": "16"}, {}, {}, "pt_hw_seq_len is '16'"),
        ({"intp_freq": False, "pt_hw_seq_len": 16}, {}, {}, "pt_hw_seq_len is 16 and intp_freq False.*4 patches"),
        ({"rope_base": 500}, {}, {}, "vision_config has rope_base, not known here"),
        ({}, {}, {"add_projections": True}, "add_projections True"),
        ({}, {}, {"truncate_dim": 16}, "truncate_dim 16, and .* None"),
        ({}, {}, {"towers": 3}, "has towers, not known"),
        ({}, {"resize_mode": "longest"}, {}, "resize_mode 'longest' with fill_color 0.*crop_mode="),
        ({}, {"size": 48}, {}, "resolution is 48, and the tower's 32"),
        ({}, {"interpolation": "random"}, {}, "interpolation is 'random'"),
        ({}, {"do_normalize": False}, {}, "do_normalize False, and .* True"),
        ({}, {"rescale_factor": 1 / 127.5}, {}, "rescale_factor"),
        ({}, {"gamma": 2.2}, {}, "has gamma, not known"),
    ],
)  # fmt: skip
def test_what_a_jina_directory_says_else_is_refused_by_name(vision, processor, top, match, write_jina):
    directory = write_jina(vision, processor, **top)
    with pytest.raises(ValueError, match=match):
        VisionTower.from_pretrained(directory)


CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073], "do_convert_rgb": True,
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def test_an_image_processor_beside_a_tower_must_say_the_same(tower, write_timm, tmp_path):
    """As beside a timm model that transformers wraps, and beside a tower of ours."""
    directory = write_timm()
    processor = directory / "preprocessor_config.json"
    processor.write_text(json.dumps(CLIP_PROCESSOR))
    assert VisionTower.from_pretrained(directory).config.resolution == 32
    for changes, match in (
        ({"image_mean": [0.5, 0.5, 0.5]}, r"mean is \(0\.5, 0\.5, 0\.5\), and the tower's \(0\.481"),
        ({"size": {"shortest_edge": 40}}, r"crop_pct is 0\.8, and the tower's 1\.0"),
        ({"resample": 2}, "interpolation is 'bilinear', and the tower's 'bicubic'"),
        ({"size": {"height": 32, "width": 32}, "crop_size": None}, "crop_mode is 'squash', and the tower's 'center'"),
        ({"do_center_crop": False}, "do_center_crop False"),
    ):
        processor.write_text(json.dumps({**CLIP_PROCESSOR, **changes}))
        with pytest.raises(ValueError, match=match):
            VisionTower.from_pretrained(directory)
    processor.write_text(json.dumps({**CLIP_PROCESSOR, **FAST}))
    assert VisionTower.from_pretrained(directory).config.resolution == 32
    own = tmp_path / "own"
    tower.save_pretrained(own)
    (own / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    with pytest.raises(ValueError, match="resolution is 32, and the tower's 48"):
        VisionTower.from_pretrained(own)


@pytest.mark.parametrize(("crop_pct", "whole"), [(0.9, 35), (0.875, 36), (0.8, 40)])
def test_a_crop_that_makes_the_same_size_is_the_same(write_timm, crop_pct, whole):
    directory = write_timm(None, {"crop_pct": crop_pct}, _attn_implementation_autoset=True)
    processor = {**CLIP_PROCESSOR, "size": {"shortest_edge": whole, "longest_edge": None}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    assert VisionTower.from_pretrained(directory).config.crop_pct == crop_pct
    (directory / "preprocessor_config.json").write_text(json.dumps({**processor, "size": {"shortest_edge": whole + 1}}))
    with pytest.raises(ValueError, match=f"and the tower's {crop_pct}"):
        VisionTower.from_pretrained(directory)


@pytest.mark.parametrize(("target", "whole"), [(224, 354), (224, 400), (336, 463), (224, 256), (224, 224)])
def test_a_processors_size_comes_back_from_its_crop(target, whole, tmp_path):
    sizes = {"size": {"shortest_edge": whole}, "crop_size": {"height": target, "width": target}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CLIP_PROCESSOR, **sizes}))
    assert math.floor(target / processor_settings(tmp_path, crop_mode=None)["crop_pct"]) == whole


@pytest.fixture
def write_open_clip(tmp_path, monkeypatch) -> Callable[..., Path]:
    """open_clip names an entry of timm's for the shape: here a small one."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **rest: create(name, **({**SMALL, **rest} if name == NAME else rest))
    )

    def write(vision: dict[str, Any] | None = None, preprocess: dict[str, Any] | None = None, **model: Any) -> Path:
        tower = randomized(
            VisionTower(VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2, hidden=85))
        )
        weights = {f"visual.trunk.{key}": value for key, value in tower.state_dict().items()}
        weights |= {"visual.trunk.head.weight": torch.zeros(16, 32), "visual.trunk.head.bias": torch.zeros(16)}
        save_file(weights, tmp_path / "open_clip_model.safetensors")
        of_vision = {"image_size": 32, "timm_model_name": NAME, "timm_model_pretrained": False, "timm_pool": "token",
                     "timm_proj": None, **(vision or {})}  # fmt: skip
        values = {"model_cfg": {"embed_dim": 16, "vision_cfg": of_vision, "text_cfg": {}, "custom_text": True, **model}}
        values["preprocess_cfg"] = {
            **IMAGENET,
            "interpolation": "bilinear",
            "resize_mode": "squash",
            **(preprocess or {}),
        }
        (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_an_open_clip_directorys_preprocessing_gives_open_clips_pixels(write_open_clip, noise):
    from open_clip.transform import image_transform

    tower = VisionTower.from_pretrained(write_open_clip(), num_classes=0)
    options = {"mean": IMAGENET["mean"], "std": IMAGENET["std"], "interpolation": "bilinear", "resize_mode": "squash"}
    expected = image_transform(32, is_train=False, **options)(noise)
    torch.testing.assert_close(tower.normalize(tower.preprocess(noise)), expected, rtol=1e-5, atol=1e-5)
    assert tower.config.hidden == 85


@pytest.mark.parametrize(
    ("vision", "preprocess", "model", "match"),
    [
        ({"timm_pool": "avg"}, {}, {}, "vision_cfg has timm_pool 'avg', and .* 'token'"),
        ({"timm_proj": "mlp"}, {}, {}, "timm_proj 'mlp'"),
        ({"timm_model_name": None, "layers": 12}, {}, {}, "names no timm_model_name"),
        ({"timm_model_name": "eva03"}, {}, {}, "timm cannot make 'eva03'"),
        ({"qk_norm": True}, {}, {}, "vision_cfg has qk_norm, not known"),
        ({}, {"resize_mode": "longest"}, {}, "resize_mode 'longest'"),
        ({}, {"mode": "L"}, {}, "mode 'L', and .* 'RGB'"),
        ({}, {"size": 64}, {}, "positions|does not fit"),
        ({}, {}, {"towers": 3}, "model_cfg has towers"),
    ],
)  # fmt: skip
def test_what_an_open_clip_directory_says_else_is_refused_by_name(vision, preprocess, model, match, write_open_clip):
    with pytest.raises(ValueError, match=match):
        VisionTower.from_pretrained(write_open_clip(vision, preprocess, **model), num_classes=0)


def test_an_open_clip_directorys_projection_goes_only_where_that_is_stated(write_open_clip):
    with pytest.raises(ValueError, match=r"num_classes 16.*state num_classes=0"):
        VisionTower.from_pretrained(write_open_clip())
