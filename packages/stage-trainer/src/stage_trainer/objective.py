"""The stage's loss: text loss plus image-text loss (paper, equation 3), as one module for DeepSpeed to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from contrastive_losses import InfoNCE
from text_tower import PackedTokens
from torch import Tensor, nn
from vision_tower import normalize, patch_keep_indices

from stage_trainer.model import DualEncoder
from stage_trainer.recipe import Loss


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 `[I, 3, R, R]`, already augmented; None when the image-text task rests.
        image_seeds: `[I]` int64, the seed of each image's patch dropout.
        image_ids: `[I]` int64, equal for samples that show the same item.
        texts: all texts of the step in one packed sequence: I captions, P queries, P targets, P·K hard negatives;
            None when this rank has none.
        text_seeds: int64, one for each text, for dropout.
        pairs: P.
        negatives: K.
        text_ids: `[P]` int64.
    """

    images: Tensor | None
    image_seeds: Tensor
    image_ids: Tensor
    texts: PackedTokens | None
    text_seeds: Tensor
    pairs: int
    negatives: int
    text_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in vars(self).items()}
        return Batch(**moved)


class MultiTask(nn.Module):
    """Embeds a batch with both towers and returns each task's loss.

    Args:
        model: the towers and temperatures.
        loss: dims and the temperatures' floor.
        precision: `bf16` computes the towers in bfloat16 (torch.autocast); parameters and losses stay float32.
    """

    def __init__(self, model: DualEncoder, loss: Loss, precision: str):
        super().__init__()
        self.model = model
        self.precision = precision
        # The losses learn the model's own temperatures, so that a checkpoint of the model is all there is to keep.
        self.image_text = InfoNCE(loss.dims, temperature=loss.min_temperature, min_temperature=loss.min_temperature)
        self.image_text.log_scale = model.logit_scale
        self.text = InfoNCE(loss.dims, temperature=loss.min_temperature, min_temperature=loss.min_temperature)
        self.text.log_scale = model.text_logit_scale

    def forward(
        self, batch: Batch, *, tasks: tuple[str, ...], patch_dropout: float = 0.0, group: Any = None
    ) -> dict[str, tuple[Tensor, Any]]:
        """Loss and `LossStats` of each of `tasks` ("image_text", "text"), each over the global batch of all ranks."""
        device = self.model.logit_scale.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            width = self.model.text.config.width
            images, texts = torch.zeros(0, width, device=device), torch.zeros(0, width, device=device)
            if batch.images is not None and len(batch.images):
                keep = None
                if patch_dropout:
                    keep = patch_keep_indices(batch.image_seeds, self.model.vision.config.num_patches, patch_dropout)
                images = self.model.vision(normalize(batch.images), keep=keep)
            if batch.texts is not None:
                texts = self.model.text(batch.texts, sample_seeds=batch.text_seeds)
        captions, queries, targets, negatives = texts.split(
            [len(images), batch.pairs, batch.pairs, batch.pairs * batch.negatives]
        )
        losses = {}
        if "image_text" in tasks:
            ids = batch.image_ids
            losses["image_text"] = self.image_text(
                captions, images, query_ids=ids, target_ids=ids, group=group, return_stats=True
            )
        if "text" in tasks:
            ids = batch.text_ids
            hard = negatives.view(batch.pairs, batch.negatives, -1) if batch.negatives else None
            losses["text"] = self.text(
                queries, targets, hard, query_ids=ids, target_ids=ids, group=group, return_stats=True
            )
        return losses

    def clamp_(self) -> None:
        """Keeps both temperatures at or above their floor; to be called after each optimizer step."""
        self.image_text.clamp_()
        self.text.clamp_()
