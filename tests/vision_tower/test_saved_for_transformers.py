"""transformers opens what `save_pretrained` writes: the model as timm_wrapper, and an image processor that follows the
tower's preprocessing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from vision_tower import VisionTower

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CASES = [
    ({}, "CLIPImageProcessorPil"),
    ({**IMAGENET, "crop_pct": 0.9, "interpolation": "bilinear"}, "CLIPImageProcessorPil"),
    ({"crop_mode": "squash", "interpolation": "lanczos"}, "CLIPImageProcessorPil"),
    ({"crop_mode": "squash", "crop_pct": 0.8}, "CLIPImageProcessorPil"),
    ({"crop_mode": "squash", "resolution": (48, 64)}, "CLIPImageProcessorPil"),
    ({"crop_mode": "squash", "resolution": (48, 64), "crop_pct": 0.8}, "TimmWrapperImageProcessor"),
    ({"resolution": (48, 64)}, "TimmWrapperImageProcessor"),
    ({"crop_mode": "border", **IMAGENET}, "TimmWrapperImageProcessor"),
]


@pytest.mark.parametrize(("changes", "kind"), CASES, ids=lambda case: str(case)[:60])
def test_transformers_gives_the_towers_embeddings(changes, kind, make_tower, config, tmp_path):
    tower = make_tower(replace(config, **changes))
    tower.save_pretrained(tmp_path)
    assert VisionTower.from_pretrained(tmp_path).config == tower.config
    model, said = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert (model.config.model_type, model.config.num_features) == ("timm_wrapper", 64)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor).__name__ == kind
    pixels = np.random.default_rng(0).integers(0, 256, (60, 68, 3), dtype=np.uint8)  # a surplus of 6
    with torch.no_grad():
        found = model.eval()(processor(Image.fromarray(pixels), return_tensors="pt").pixel_values).pooler_output
    np.testing.assert_allclose(tower.encode([pixels], normalize=False), found, rtol=0, atol=2e-5)


def test_what_transformers_saves_again_is_read_here(tower, images, tmp_path):
    tower.save_pretrained(tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    back = VisionTower.from_pretrained(tmp_path / "again")
    assert back.config == tower.config
    assert torch.equal(back(images), tower(images))


def test_a_processor_of_the_tower_that_stood_here_before_does_not_stay(tower, make_tower, config, tmp_path):
    tower.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    make_tower(replace(config, crop_mode="border")).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert "image_processor_type" not in json.loads((tmp_path / "config.json").read_text())
    assert VisionTower.from_pretrained(tmp_path).config.crop_mode == "border"
