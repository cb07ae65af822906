"""EVA02 image towers with 2D rotary positions at any resolution, and the pixels that they read.

What needs torch, and timm with it, is imported at first use: a recipe is checked, and an image file read, without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .augment import augment
from .config import VisionTowerConfig
from .errors import ImageError, WeightsError
from .preprocess import load_image, normalize, preprocess, preprocess_native

if TYPE_CHECKING:
    from .packed import PackedPatches
    from .patches import patch_keep_indices, resample_optimizer_state, resample_position_table
    from .simclr import simclr_view
    from .tower import VisionTower

__all__ = [
    "ImageError",
    "PackedPatches",
    "VisionTower",
    "VisionTowerConfig",
    "WeightsError",
    "augment",
    "load_image",
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
    "VisionTower": "tower",
    "patch_keep_indices": "patches",
    "resample_optimizer_state": "patches",
    "resample_position_table": "patches",
    "simclr_view": "simclr",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
