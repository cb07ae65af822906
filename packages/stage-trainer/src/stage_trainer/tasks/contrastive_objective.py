"""Embeddings of images and texts, their losses, and the temperatures: text loss plus image-text loss (paper, equation
3), or one loss over the unified batch of section 5.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from contrastive_losses import matryoshka_info_nce, unified_info_nce
from text_tower.packed import to_device
from torch import Tensor, nn
from vision_tower import patch_keep_indices

from stage_trainer.batch import Batch, Embedded, Part
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine import Engine
from stage_trainer.optim.groups import ParameterGroups
from stage_trainer.recipe import LossConfig, OptimizerConfig, Stage
from stage_trainer.tasks.task import Losses, TrainedObjective


class ContrastiveObjective(TrainedObjective):
    """Embeds images and texts, and gives the losses over what was embedded.

    These are two steps, because gradient caching embeds in parts and computes one loss over all of them.

    Args:
        model: the towers and temperatures.
        loss: kind, dims and the temperatures' floor.
        precision: `bf16` computes the towers in bfloat16 (torch.autocast), and the losses' products of embeddings;
            parameters, embeddings, logits and losses stay float32.
    """

    model: DualEncoder

    def __init__(self, model: DualEncoder, loss: LossConfig, precision: str):
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision
        self.scales = nn.ModuleDict({name: Scale(parameter) for name, parameter in self.logit_scales.items()})

    @property
    def logit_scales(self) -> dict[str, nn.Parameter]:
        """ln(1 / temperature) of each loss, shape [1]; under ZeRO 3 partitioned."""
        return {"image_text": self.model.logit_scale, "text": self.model.text_logit_scale}

    def set_trainable(self, stage: Stage) -> None:
        # Texts are embedded with the default adapter: another one would get zeros for gradients, and decay.
        text = self.model.text
        text.set_trainable(stage.trainable.text, adapter=next(iter(text.config.adapters), None))
        self.model.vision.set_trainable(stage.trainable.image)
        for name, scale in self.logit_scales.items():
            used = name == "image_text" if self.loss.kind == "unified" else bool(getattr(stage.batch, name))
            scale.requires_grad_(used)

    def parameter_groups(
        self, stage: Stage, config: OptimizerConfig, saved: Mapping[str, Tensor] | None = None
    ) -> ParameterGroups:
        """The groups of both towers and both temperatures."""
        groups, model, lr, decay = ParameterGroups(config, saved), self.model, stage.lr, stage.layer_decay
        groups.add_tower("image", model.vision, prefix="vision.", lr=lr.image, layer_decay=decay.image)
        groups.add_tower("text", model.text, prefix="text.", lr=lr.text, layer_decay=decay.text)
        # A unified loss has one temperature for both kinds of pairs, which does not wait for images.
        waits = self.loss.kind != "unified"
        groups.add_temperature("logit_scale", model.logit_scale, tower="image", lr=lr.image, waits=waits)
        groups.add_temperature("text_logit_scale", model.text_logit_scale, tower="text", lr=lr.text)
        return groups

    def forward(self, part: Part, *, patch_dropout: float = 0.0) -> Embedded:
        scales = {name: scale() for name, scale in self.scales.items()}
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

    def losses(self, embedded: Embedded, batch: Batch, *, pairs: tuple[str, ...], group: Any = None) -> Losses:
        """Each loss with its `LossStats`, over the global batch of all ranks.

        Args:
            embedded: of this rank's part of the batch.
            batch: that part.
            pairs: the kinds that take part ("image_text", "text"); a unified loss has one for all.
            group: the ranks whose parts make the global batch.
        """
        device, count = embedded.images.device, len(batch.image_ids)
        sizes = [count, batch.pairs, batch.pairs, batch.pairs * batch.negatives]
        captions, queries, targets, negatives = torch.split(embedded.texts, sizes)
        image_ids, text_ids = (to_device(ids, device) for ids in (batch.image_ids, batch.text_ids))
        temperatures = {name: torch.exp(-scale) for name, scale in embedded.scales.items()}
        # Embeddings are float32 but have the towers' error, beside which that of rounding them is small; a GPU's tensor
        # cores do not take float32.
        products: Any = "bf16" if self.precision == "bf16" else None
        if self.loss.kind == "unified":
            images, *views = embedded.images.view(1 + self.loss.views, count, embedded.images.shape[1])
            found = unified_info_nce(
                (images, captions), (queries, targets), tuple(views) or None, temperature=temperatures["image_text"],
                dims=self.loss.dims, image_ids=image_ids, text_ids=text_ids, precision=products, group=group,
                return_stats=True,
            )  # fmt: skip
            return {"unified": found}  # type: ignore[dict-item]
        hard = negatives.view(batch.pairs, batch.negatives, -1) if batch.negatives else None
        of_pairs = {
            "image_text": (captions, embedded.images, None, image_ids),
            "text": (queries, targets, hard, text_ids),
        }
        losses: dict[str, Any] = {}
        for name in pairs:
            queries, targets, hard, ids = of_pairs[name]
            losses[name] = matryoshka_info_nce(
                queries, targets, negatives=hard, temperature=temperatures[name], dims=self.loss.dims,
                query_ids=ids, target_ids=ids, precision=products, group=group, return_stats=True,
            )  # fmt: skip
        return losses

    def after_step(self, engine: Engine) -> None:
        """Keeps the temperatures that train from falling below their floor, which limits their logarithms."""
        for scale in self.logit_scales.values():
            if scale.requires_grad:
                engine.clamp_(scale, max=-math.log(self.loss.min_temperature))

    def temperatures(self, engine: Engine) -> dict[str, float]:
        """The temperature of each loss; every rank has to call."""
        scales = torch.cat([engine.whole(scale) for scale in self.logit_scales.values()]).tolist()
        return {name: math.exp(-scale) for name, scale in zip(self.logit_scales, scales, strict=True)}

    def figures(self, engine: Engine, losses: Losses) -> dict[str, float]:
        """Accuracy within the batch by loss and dim; the temperatures."""
        accuracies = {
            f"train_accuracy_{name}/{dim}": (forth + back) / 2
            for name, (_, stats) in losses.items()
            for dim, (forth, back) in zip(
                self.loss.dims,
                torch.stack([stats.query_to_target_accuracy, stats.target_to_query_accuracy], dim=1).tolist(),
                strict=True,
            )
        }
        return accuracies | {f"temperature/{name}": value for name, value in self.temperatures(engine).items()}


class Scale(nn.Module):
    """A temperature's parameter as a tensor; a module, because ZeRO 3 makes parameters whole in a forward pass."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__()
        self.parameter = parameter

    def forward(self) -> Tensor:
        return self.parameter.clone()
