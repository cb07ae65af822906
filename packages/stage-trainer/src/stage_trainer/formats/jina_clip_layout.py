"""The tensors of a jina-clip-v2 directory: one file for both towers and the temperature, 999 names at full size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from text_tower import TextTower, TextTowerConfig
from text_tower.layouts import Layout
from text_tower.lora import is_adapter, stacked
from torch import Tensor
from vision_tower import VisionTower, VisionTowerConfig
from vision_tower.checkpoints import to_eva_names

NAME = "jina-clip-v2"
TEXT, VISION, SCALE = "text_model.transformer.roberta.", "vision_model.", "logit_scale"
TASK = "retrieval.query"
"""The one adapter and the one instruction of the published model."""
EMPTY_RANK = EMPTY_ALPHA = 4
"""Of an adapter of zeros, which stands where the published code expects one; the published model's own."""


def tensors(text: TextTower, vision: VisionTower, logit_scale: Tensor) -> dict[str, Tensor]:
    """A model's tensors under the published names and shapes, in their own dtype; not copies.

    The published code makes an adapter in any case, with random values if the file has none: a tower without one gets
    an adapter of zeros.
    """
    state = stacked(text.state_dict())
    if not text.config.adapters:
        with torch.device("meta"):
            adapted = TextTower(with_an_adapter(text.config))
        like = next(text.parameters())
        state |= {n: like.new_zeros(t.shape) for n, t in stacked(adapted.state_dict()).items() if is_adapter(n)}
    return {
        SCALE: logit_scale.reshape(()),
        **Layout("remote-code", TEXT).from_ours(state),
        **{VISION + name: tensor for name, tensor in to_eva_names(vision.state_dict()).items()},
    }


def with_an_adapter(config: TextTowerConfig) -> TextTowerConfig:
    """The configuration of the tower that the published code makes."""
    if config.adapters:
        return config
    return replace(config, adapters=(TASK,), lora_rank=EMPTY_RANK, lora_alpha=float(EMPTY_ALPHA))


def unnamed(keys: Mapping[str, object], text: TextTowerConfig, vision: VisionTowerConfig) -> list[str]:
    """The keys of a file that a model of these shapes does not have."""
    with torch.device("meta"):
        plain = TextTower(replace(text, adapters=(), lora_rank=0))
        known = tensors(plain, VisionTower(vision), torch.empty(()))
    if not any(".parametrizations." in key for key in keys):  # merged by others
        known |= {TEXT + name: tensor for name, tensor in plain.state_dict().items()}
    return sorted(keys.keys() - known.keys())
