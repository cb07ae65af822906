"""The stage's loss: text loss plus image-text loss (paper, equation 3), or one loss over the unified batch of section
5.2, as one module for DeepSpeed to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from contrastive_losses import LossStats, matryoshka_info_nce, unified_info_nce
from text_tower import PackedTokens
from torch import Tensor, nn
from vision_tower import patch_keep_indices

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.recipe import LossConfig, Stage

Losses = dict[str, tuple[Tensor, LossStats]]
"""Loss and statistics by task, or of all in one ("unified")."""


@dataclass(frozen=True)
class Part:
    """Images and texts to embed in one forward pass.

    Attributes:
        images: uint8 `[I, 3, R, R]`, already augmented, or None.
        image_seeds: `[I]` int64, the seed of each image's patch dropout.
        texts: in one packed sequence, or None.
        text_seeds: int64, one for each text, for dropout.
    """

    images: Tensor | None
    image_seeds: Tensor
    texts: PackedTokens | None
    text_seeds: Tensor

    def to(self, device: torch.device) -> Part:
        return Part(
            None if self.images is None else self.images.to(device, non_blocking=True),
            self.image_seeds.to(device, non_blocking=True),
            None if self.texts is None else self.texts.to(device, non_blocking=True),
            self.text_seeds.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Batch(Part):
    """One rank's part of a global batch: I image-caption pairs and P text pairs with K hard negatives each.

    Its images are the I of the captions and, in a unified batch with views, twice as many more: a view of each, then
    another. Its texts are I captions, P queries, P targets and P·K hard negatives, in this order.

    Attributes:
        image_ids: `[I]` int64, equal for samples that show the same item.
        pairs: P.
        negatives: K.
        text_ids: `[P]` int64, equal for pairs about the same item.
    """

    image_ids: Tensor
    pairs: int
    negatives: int
    text_ids: Tensor


@dataclass(frozen=True)
class Embedded:
    """What a part became: images `[I, D]` and texts `[N, D]`, float32, and `scales`, ln(1 / temperature) by task, `[1]`
    each: apart, so that the one of a task that rests gets no gradient, rather than zeros."""

    images: Tensor
    texts: Tensor
    scales: dict[str, Tensor]


class MultiTask(nn.Module):
    """Embeds images and texts, and gives each task's loss over what was embedded.

    The two are apart, because gradient caching embeds in parts and takes one loss over all of them.

    Args:
        model: the towers and temperatures.
        loss: dims and the temperatures' floor.
        precision: `bf16` computes the towers in bfloat16 (torch.autocast); parameters and losses stay float32.
    """

    def __init__(self, model: DualEncoder, loss: LossConfig, precision: str):
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision
        self.scales = nn.ModuleDict({task: Scale(parameter) for task, parameter in self.logit_scales.items()})

    @property
    def logit_scales(self) -> dict[str, nn.Parameter]:
        """ln(1 / temperature) of each task, shape [1]; under ZeRO 3 cut up."""
        return {"image_text": self.model.logit_scale, "text": self.model.text_logit_scale}

    def set_trainable(self, stage: Stage) -> None:
        # Texts are embedded with the default adapter: another one would get zeros for gradients, and decay.
        text = self.model.text
        text.set_trainable(stage.trainable.text, adapter=next(iter(text.config.adapters), None))
        self.model.vision.set_trainable(stage.trainable.image)
        for task, scale in self.logit_scales.items():
            used = task == "image_text" if self.loss.kind == "unified" else bool(getattr(stage.batch, task))
            scale.requires_grad_(used)

    def forward(self, part: Part, *, patch_dropout: float = 0.0) -> Embedded:
        scales = {task: scale() for task, scale in self.scales.items()}
        some = scales["text"]
        with torch.autocast(some.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            images = texts = some.new_zeros(0, self.model.text.config.width)
            if part.images is not None:
                keep = None
                if patch_dropout:
                    keep = patch_keep_indices(part.image_seeds, self.model.vision.config.num_patches, patch_dropout)
                images = self.model.vision(self.model.vision.normalize(part.images), keep=keep)
            if part.texts is not None:
                texts = self.model.text(part.texts, sample_seeds=part.text_seeds)
        return Embedded(images, texts, scales)

    def losses(self, embedded: Embedded, batch: Batch, *, tasks: tuple[str, ...], group: Any = None) -> Losses:
        """Loss and statistics of each of `tasks` ("image_text", "text"), each over the global batch of all ranks; of a
        unified batch the one that all tasks share."""
        device, pairs, count = embedded.images.device, batch.pairs, len(batch.image_ids)
        captions, queries, targets, negatives = embedded.texts.split([count, pairs, pairs, pairs * batch.negatives])
        hard = negatives.view(pairs, batch.negatives, -1) if batch.negatives else None
        image_ids, text_ids = batch.image_ids.to(device), batch.text_ids.to(device)
        temperatures = {task: torch.exp(-scale) for task, scale in embedded.scales.items()}
        if self.loss.kind == "unified":
            images, *views = embedded.images.view(1 + self.loss.views, count, embedded.images.shape[1])
            found = unified_info_nce(
                (images, captions), (queries, targets), tuple(views) or None, temperature=temperatures["image_text"],
                dims=self.loss.dims, image_ids=image_ids, text_ids=text_ids, group=group, return_stats=True,
            )  # fmt: skip
            return {"unified": found}  # type: ignore[dict-item]
        of_task = {
            "image_text": (captions, embedded.images, None, image_ids),
            "text": (queries, targets, hard, text_ids),
        }
        losses: dict[str, Any] = {}
        for task in tasks:
            queries, targets, hard, ids = of_task[task]
            losses[task] = matryoshka_info_nce(
                queries, targets, negatives=hard, temperature=temperatures[task], dims=self.loss.dims,
                query_ids=ids, target_ids=ids, group=group, return_stats=True,
            )  # fmt: skip
        return losses

    def figures(self, losses: Losses) -> dict[str, float]:
        """What a monitor shows beside the losses: accuracy within the batch by task and dim."""
        return {
            f"train_accuracy_{task}/{dim}": (forth.item() + back.item()) / 2
            for task, (_, stats) in losses.items()
            for dim, forth, back in zip(
                self.loss.dims, stats.query_to_target_accuracy, stats.target_to_query_accuracy, strict=True
            )
        }


class Scale(nn.Module):
    """A temperature's parameter as a tensor; a module, because ZeRO 3 makes parameters whole in a forward pass."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__()
        self.parameter = parameter

    def forward(self) -> Tensor:
        return self.parameter.clone()
