"""EVA02 image towers with 2D rotary positions at any resolution, and the pixels that they read.

The tower itself, and timm with it, is imported at first use: a data worker that only augments never pays for it.
"""

from typing import TYPE_CHECKING, Any

from .augment import augment
from .config import VisionTowerConfig
from .errors import ImageError, WeightsError
from .packed import PackedPatches
from .patches import patch_keep_indices, resample_optimizer_state, resample_position_table
from .preprocess import load_image, normalize, preprocess, preprocess_native
from .simclr import simclr_view

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name == "VisionTower":
        from .tower import VisionTower

        return VisionTower
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
