"""EVA02 image towers with 2D rotary positions at any resolution, and their preprocessing.

What needs torch is imported at first use: checking a recipe or reading an image file does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vision_tower.augment import augment
from vision_tower.config import VisionTowerConfig
from vision_tower.errors import ImageError, WeightsError
from vision_tower.preprocess import load_image, load_pixels, normalize, preprocess, preprocess_native

if TYPE_CHECKING:
    from vision_tower.packed import PackedPatches
    from vision_tower.patches import patch_keep_indices, resample_optimizer_state, resample_position_table
    from vision_tower.projected import ProjectedTower
    from vision_tower.simclr import simclr_view
    from vision_tower.tower import VisionTower

__all__ = [
    "ImageError",
    "PackedPatches",
    "ProjectedTower",
    "VisionTower",
    "VisionTowerConfig",
    "WeightsError",
    "augment",
    "load_image",
    "load_pixels",
    "normalize",
    "patch_keep_indices",
    "preprocess",
    "preprocess_native",
    "resample_optimizer_state",
    "resample_position_table",
    "simclr_view",
]


_HOME = {
    "PackedPatches": "packed",
    "ProjectedTower": "projected",
    "VisionTower": "tower",
    "patch_keep_indices": "patches",
    "resample_optimizer_state": "patches",
    "resample_position_table": "patches",
    "simclr_view": "simclr",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
