"""What the directories of jina-clip and open_clip and an image processor's file say beside the weights is followed, to
the numbers of the project that wrote it, or refused by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_tower import ProjectedTower, VisionTower, VisionTowerConfig, WeightsError
from vision_tower.foreign import processor_settings

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

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
    assert config == VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2, mlp_width=85)
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
    expected = VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2, mlp_width=85)
    assert VisionTower.from_pretrained(written).config == expected


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_jina_processor_gives_torchvisions_pixels(mode, write_jina, noise_image):
    from torchvision.transforms import v2

    statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    directory = write_jina(None, {"resize_mode": mode, "interpolation": "bilinear", **statistics})
    tower = VisionTower.from_pretrained(directory)
    size = [32, 32] if mode == "squash" else 32
    steps = [v2.Resize(size, v2.InterpolationMode.BILINEAR), v2.CenterCrop(32), v2.PILToTensor()]
    pixels = v2.Compose(steps)(noise_image)
    assert torch.equal(tower.preprocess(noise_image), pixels)
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
def write_open_clip(tmp_path, monkeypatch, make_tower, small_timm) -> Callable[..., Path]:
    """open_clip names an entry of timm's for the shape: here a small one."""
    import timm

    find, (entry, small) = timm.models.model_entrypoint, small_timm
    made = find(entry)
    monkeypatch.setattr(
        timm.models,
        "model_entrypoint",
        lambda name: (lambda **rest: made(**{**small, **rest})) if name == entry else find(name),
    )

    def write(vision: dict[str, Any] | None = None, preprocess: dict[str, Any] | None = None, **model: Any) -> Path:
        tower = make_tower(VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2, mlp_width=85))
        weights = {f"visual.trunk.{key}": value for key, value in tower.state_dict().items()}
        weights |= {"visual.trunk.head.weight": torch.zeros(16, 32), "visual.trunk.head.bias": torch.zeros(16)}
        save_file(weights, tmp_path / "open_clip_model.safetensors")
        of_vision = {"image_size": 32, "timm_model_name": entry, "timm_model_pretrained": False, "timm_pool": "token",
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


def test_an_open_clip_directorys_preprocessing_gives_open_clips_pixels(write_open_clip, noise_image):
    from open_clip.transform import image_transform

    tower = VisionTower.from_pretrained(write_open_clip(), num_classes=0)
    options = {"mean": IMAGENET["mean"], "std": IMAGENET["std"], "interpolation": "bilinear", "resize_mode": "squash"}
    expected = image_transform(32, is_train=False, **options)(noise_image)
    torch.testing.assert_close(tower.normalize(tower.preprocess(noise_image)), expected, rtol=1e-5, atol=1e-5)
    assert tower.config.mlp_width == 85


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


def test_open_clips_image_half_comes_with_its_projection(
    write_open_clip, small_timm, tmp_path, noise_image, monkeypatch
):
    """Held against open_clip's own image tower, from its directory and from a bare checkpoint."""
    import timm
    from open_clip.timm_model import TimmModel

    folder, (entry, small), create = write_open_clip(), small_timm, timm.create_model
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **asked: create(name, **{**small, **asked}))
        theirs = TimmModel(entry, embed_dim=16, image_size=32, pool="token", proj=None).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    weights = {f"visual.{key}": value for key, value in theirs.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    ours = ProjectedTower.from_pretrained(folder)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.shape == (3, 16)
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
        pixels = ours.tower.normalize(ours.tower.preprocess(noise_image))[None]
        expected = torch.nn.functional.normalize(theirs(pixels)[:, :8], dim=-1).numpy()
    assert np.abs(ours.encode([noise_image], truncate_dim=8) - expected).max() < 1e-6
    assert ours.encode([noise_image] * 2, normalize=False).shape == (2, 16)
    assert ours.encode([]).shape == (0, 16)
    with pytest.raises(ValueError, match="truncate_dim is 17; expected 1 … 16"):
        ours.encode([noise_image], truncate_dim=17)
    # EVA-CLIP's own file has it as visual.head, a training checkpoint of open_clip as a state_dict.
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "epoch_1.pt")
    torch.save({key.replace("visual.trunk.", "visual."): v for key, v in weights.items()}, tmp_path / "eva.pt")
    for name in ("epoch_1.pt", "eva.pt"):
        with torch.no_grad():
            found = ProjectedTower.from_pretrained(tmp_path / name, heads=2)(images)
            torch.testing.assert_close(found, theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": None}, "has no projection"),
        ({"weight": torch.zeros(16, 31)}, r"projection of \[\[16, 31\], \[16\]\]; expected \[D, 32\]"),
        ({"bias": torch.zeros(15)}, r"projection of \[\[16, 32\], \[15\]\]"),
        ({"weight": torch.zeros(16)}, r"projection of \[\[16\], \[16\]\]"),
    ],
)
def test_a_projection_that_is_none_or_does_not_fit_is_refused(write_open_clip, change, match):
    folder = write_open_clip()
    weights = {**load_file(folder / "open_clip_model.safetensors")}
    for name, value in change.items():
        weights.pop(f"visual.trunk.head.{name}")
        weights |= {f"visual.trunk.head.{name}": value} if value is not None else {}
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=match):
        ProjectedTower.from_pretrained(folder)
