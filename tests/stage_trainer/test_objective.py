"""The objective hands the towers what their weights were trained on."""

import torch
from stage_trainer.batch import Batch, Embedded, Part
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.recipe import LossConfig
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import TextTower, TextTowerConfig
from torchvision.transforms import v2
from vision_tower import VisionTower, VisionTowerConfig


def test_images_are_normalised_with_the_towers_own_mean_and_std():
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    vision = VisionTower(VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, **statistics))
    model = DualEncoder(TextTower(TextTowerConfig(vocab_size=20, width=16, layers=1, heads=2, mlp_width=16)), vision)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(2)
    with torch.no_grad():
        found = ContrastiveObjective(model, LossConfig(dims=(16,)), "fp32")(Part(images, seeds, None, seeds[:0])).images
        expected = vision(v2.functional.normalize(images.float() / 255, **statistics))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_losses_take_the_products_of_bfloat16_embeddings(monkeypatch):
    """Towers give float32 under autocast, which would keep them from a GPU's tensor cores."""
    towers = {"width": 16, "layers": 1, "heads": 2}
    model = DualEncoder(
        TextTower(TextTowerConfig(vocab_size=20, mlp_width=16, **towers)),
        VisionTower(VisionTowerConfig(resolution=16, patch=8, **towers)),
    )
    images, texts = torch.randn(9, 16), torch.randn(9, 16)
    seeds, ids = torch.arange(0), torch.arange(3)
    batch = Batch(None, seeds, None, torch.arange(9), image_ids=ids, text_ids=ids, pairs=3, negatives=0)
    scales = {name: torch.tensor([2.0]) for name in ("image_text", "text")}
    for kind in ("multi_task", "unified"):
        config = LossConfig(kind=kind, dims=(16, 8))
        found = {}
        for precision, cast in (("bf16", False), ("fp32", True), ("fp32", False)):
            of_images = images if kind == "unified" else images[:3]  # with two views of each
            embedded = Embedded(*(x.bfloat16() if cast else x for x in (of_images, texts)), scales)
            losses = ContrastiveObjective(model, config, precision).losses(
                embedded, batch, pairs=("image_text", "text")
            )
            found[precision, cast] = torch.stack([loss for loss, _ in losses.values()])
        assert torch.equal(found["bf16", False], found["fp32", True])
        assert not torch.equal(found["bf16", False], found["fp32", False])
