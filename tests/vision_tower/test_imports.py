"""What the tower draws in: timm, torchvision and PyTorch's compiler take seconds to import, and only timm's own models
and `compile=True` need them."""

import subprocess
import sys

HEAVY = {"timm", "torchvision", "torch._dynamo", "sympy"}


def test_a_tower_is_made_saved_read_and_run_without_timm_torchvision_and_the_compiler(tmp_path):
    code = f"""
import sys, torch
from PIL import Image
from vision_tower import PackedPatches, VisionTower, VisionTowerConfig, augment, patch_keep_indices
config = VisionTowerConfig(resolution=16, patch=8, width=16, layers=2, heads=2)
with torch.device("meta"):
    assert VisionTower(config).set_resolution(32).pos_embed.shape == (1, 17, 16)
VisionTower(config).save_pretrained({str(tmp_path)!r})
tower = VisionTower.from_pretrained({str(tmp_path)!r}, resolution=24)
images = tower.normalize(torch.stack([tower.preprocess(Image.new("RGB", (30, 20)))] * 2))
tower(images, keep=patch_keep_indices([1, 2], 9, 0.5)).sum().backward()
tower(PackedPatches.from_images(list(images), 8)).sum().backward()
tower.encode([Image.new("RGB", (30, 20))])
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not HEAVY & set(loaded)
