"""The objective hands the towers what their weights were trained on."""

import torch
from stage_trainer.batch import Part
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
