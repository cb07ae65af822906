"""The tensors of a jina-clip-v1 directory: one file for both towers and the temperature, 395 names at full size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from text_tower import TextTower, TextTowerConfig
from text_tower.layouts import Layout
from torch import Tensor
from vision_tower import VisionTower, VisionTowerConfig
from vision_tower.checkpoints import to_eva_names

from stage_trainer.formats.jina_clip_layout import SCALE, VISION

NAME = "jina-clip-v1"
TEXT = "text_model.transformer."


def tensors(text: TextTower, vision: VisionTower, logit_scale: Tensor) -> dict[str, Tensor]:
    """The tensors of a model without adapters under the published names and shapes, in their own dtype; not copies."""
    return {
        SCALE: logit_scale.reshape(()),
        **Layout("jina-bert-flash", TEXT).from_ours(text.state_dict()),
        **{VISION + name: tensor for name, tensor in to_eva_names(vision.state_dict()).items()},
    }


def unnamed(keys: Mapping[str, object], text: TextTowerConfig, vision: VisionTowerConfig) -> list[str]:
    """The keys of a file that a model of these shapes does not have."""
    with torch.device("meta"):
        known = tensors(TextTower(text), VisionTower(vision), torch.empty(()))
    return sorted(keys.keys() - known.keys())
