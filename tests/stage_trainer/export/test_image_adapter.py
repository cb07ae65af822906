"""The image tower's LoRA adapter is merged in every format that other libraries read, and kept in our own; a projector
is in the formats that have a place for it."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from vision_tower import VisionTower


@pytest.mark.parametrize("form", ["trilith", "common", "open-clip", "jina-clip"])
def test_every_format_has_the_vectors_with_the_adapter(form, make_model, save, tmp_path, sentences, capsys):
    model = make_model(vision={"lora_rank": 2, "lora_alpha": 3.0, "crop_pct": 1.0})
    save(tmp_path / "stage1", model)
    options = ["--dtype=float32"] if form == "jina-clip" else []
    assert main(["export", str(tmp_path / "stage1"), str(tmp_path / "out"), f"--format={form}", *options]) == 0
    assert ("the image tower's adapter is merged" in capsys.readouterr().out) == (form != "trilith")
    there = DualEncoder.from_pretrained(tmp_path / "out")
    assert there.vision.config.lora_rank == (2 if form == "trilith" else 0)
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    expected, without = model.encode_image(list(images)), DualEncoder(model.text, _bare(model)).encode_image(images)
    assert np.abs(there.encode_image(list(images)) - expected).max() < 1e-5
    assert np.abs(without - expected).max() > 1e-2


ADDED = {
    "adapter": {"lora_rank": 2, "lora_alpha": 3.0},
    "projector": {"projector": 32},
    "two products": {"projector": 32, "projector_hidden": 24},
}


@pytest.mark.parametrize("added", ADDED)
def test_a_graph_has_what_was_added_to_the_image_tower(added, make_model, save, tmp_path):
    model = make_model(vision={"crop_pct": 1.0, **ADDED[added]})
    save(tmp_path / "stage1", model)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "stage1"), str(out), "--format=onnx", "--dtype=float32"]) == 0
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    graph = onnxruntime.InferenceSession(out / "onnx/vision_model.onnx")
    (found,) = graph.run(["image_embeddings"], {"pixel_values": pixels.numpy()})
    with torch.inference_mode():
        expected, without = model.vision(pixels).numpy(), _bare(model)(pixels).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert without.shape != expected.shape or np.abs(without - expected).max() > 1e-2


def _bare(model):
    """The image tower without its adapter or projector, which is then nowhere."""
    tower = VisionTower(replace(model.vision.config, lora_rank=0, projector=0, projector_hidden=0))
    tower.load_state_dict({name: model.vision.state_dict()[name] for name in tower.state_dict()})
    return tower
