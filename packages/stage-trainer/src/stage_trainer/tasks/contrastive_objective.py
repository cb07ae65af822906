"""Embeddings of images and texts, their losses, and the temperatures: text loss plus image-text loss (paper, equation
3), or one loss over the unified batch of section 5.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from contrastive_losses import LossStats, matryoshka_cosent, matryoshka_info_nce, matryoshka_sigmoid, unified_info_nce
from text_tower.packed import to_device
from torch import Tensor, nn
from torch.distributed import ProcessGroup
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
        model: the towers, temperatures and, for a sigmoid loss, biases.
        loss: kind, dims with their weights, what the temperatures may do, and the margin of false negatives.
        precision: `bf16` computes the towers in bfloat16 (torch.autocast), and the losses' products of embeddings;
            parameters, embeddings, logits and losses stay float32.
    """

    model: DualEncoder

    def __init__(self, model: DualEncoder, loss: LossConfig, precision: str):
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision
        self.scalars = nn.ModuleDict({name: Scalar(p) for name, p in (self.logit_scales | self.biases).items()})

    @property
    def logit_scales(self) -> dict[str, nn.Parameter]:
        """ln(1 / temperature) of each loss, shape [1]; under ZeRO 3 partitioned."""
        return {"image_text": self.model.logit_scale, "text": self.model.text_logit_scale}

    @property
    def biases(self) -> dict[str, nn.Parameter]:
        """The bias of each sigmoid loss, shape [1], by `TASK_bias`; no others have any."""
        model = self.model
        found = {"image_text_bias": model.logit_bias, "text_bias": model.text_logit_bias}
        return {name: bias for name, bias in found.items() if bias is not None}

    def set_trainable(self, stage: Stage) -> None:
        # Texts are embedded with the default adapter: another one would get zeros for gradients, and decay.
        text = self.model.text
        text.set_trainable(stage.trainable.text, adapter=next(iter(text.config.adapters), None))
        self.model.vision.set_trainable(stage.trainable.image)
        for name, scale in self.logit_scales.items():
            scale.requires_grad_(bool(getattr(stage.batch, name)) and self.loss.learns_temperature(name))
        for name, bias in self.biases.items():
            bias.requires_grad_(bool(getattr(stage.batch, name.removesuffix("_bias"))))

    def parameter_groups(
        self, stage: Stage, config: OptimizerConfig, saved: Mapping[str, Tensor] | None = None
    ) -> ParameterGroups:
        """The groups of both towers, and of the losses' temperatures and biases."""
        groups, model, lr, decay = ParameterGroups(config, saved), self.model, stage.lr, stage.layer_decay
        groups.add_tower("image", model.vision, prefix="vision.", lr=lr.image, layer_decay=decay.image)
        groups.add_tower("text", model.text, prefix="text.", lr=lr.text, layer_decay=decay.text)
        # One temperature for both kinds of pairs does not wait for images.
        waits = not self.loss.one_temperature
        groups.add_scalar("logit_scale", model.logit_scale, tower="image", lr=lr.image, waits=waits)
        groups.add_scalar("text_logit_scale", model.text_logit_scale, tower="text", lr=lr.text)
        if model.logit_bias is not None and model.text_logit_bias is not None:
            groups.add_scalar("logit_bias", model.logit_bias, tower="image", lr=lr.image)
            groups.add_scalar("text_logit_bias", model.text_logit_bias, tower="text", lr=lr.text)
        return groups

    def forward(self, part: Part, *, patch_dropout: float = 0.0) -> Embedded:
        scalars = {name: scalar() for name, scalar in self.scalars.items()}
        some = scalars["text"]
        with torch.autocast(some.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            images = texts = some.new_zeros(0, self.model.text.config.output_width)
            if part.images is not None and part.images.ndim == 2:  # a frozen tower's, from the disk
                images = self.model.vision.project(part.images)
            elif part.images is not None:
                keep = None
                if patch_dropout:
                    keep = patch_keep_indices(part.image_seeds, self.model.vision.config.num_patches, patch_dropout)
                images = self.model.vision(self.model.vision.normalize(part.images), keep=keep)
            if isinstance(part.texts, Tensor):  # a frozen tower's, from the disk
                texts = self.model.text.project(part.texts)
            elif part.texts is not None:
                texts = self.model.text(part.texts, sample_seeds=part.text_seeds)
        return Embedded(images, texts, scalars)

    def losses(
        self, embedded: Embedded, batch: Batch, *, pairs: tuple[str, ...], group: ProcessGroup | None = None
    ) -> Losses:
        """Each loss with its `LossStats`, over the global batch of all ranks; that of graded pairs, "graded", has none.

        Args:
            embedded: of this rank's part of the batch.
            batch: that part.
            pairs: the kinds that take part ("image_text", "text"); a unified loss has one for all.
            group: the ranks whose parts make the global batch.
        """
        device, count = embedded.images.device, len(batch.image_ids)
        sizes = [batch.captions, batch.pairs, batch.pairs, batch.pairs * batch.negatives]
        captions, queries, targets, negatives = torch.split(embedded.texts, sizes)
        image_ids, text_ids = (to_device(ids, device) for ids in (batch.image_ids, batch.text_ids))
        temperatures = {name: self.temperature_of(name, embedded) for name in pairs}
        # Embeddings are float32 but have the towers' error, beside which that of rounding them is small; a GPU's tensor
        # cores do not take float32.
        products: Any = "bf16" if self.precision == "bf16" else None
        options: dict[str, Any] = {
            "dims": self.loss.dims, "weights": self.loss.weights or None, "precision": products, "group": group,
            "false_negative_margin": self.loss.false_negative_margin, "return_stats": True,
            "exchange": self.loss.exchange,
        }  # fmt: skip
        if self.loss.kind == "unified":
            images, *views = embedded.images.view(1 + self.loss.views, count, embedded.images.shape[1])
            found = unified_info_nce(
                (images, captions), (queries, targets), tuple(views) or None, temperature=temperatures["image_text"],
                image_ids=image_ids, text_ids=text_ids, **options,
            )  # fmt: skip
            return {"unified": found}  # type: ignore[dict-item]
        width = embedded.texts.shape[1]  # -1 in its place would be ambiguous where a rank has none
        hard = negatives.view(batch.pairs, batch.negatives, width) if batch.negatives else None
        images, further = embedded.images[:count], None
        if batch.image_negatives:
            further = embedded.images[count:].view(batch.image_negatives, count, width).transpose(0, 1)
        of_pairs = {
            "image_text": (captions, images, further, image_ids),
            "text": (queries, targets, hard, text_ids),
        }
        losses: dict[str, Any] = {}
        for name in pairs:
            queries, targets, hard, ids = of_pairs[name]
            if name == "text" and batch.scores is not None:
                losses["graded"] = self._graded_loss(queries, targets, batch.scores, temperatures[name], group), None
                continue
            options |= {"negatives": hard, "query_ids": ids, "target_ids": ids, "temperature": temperatures[name]}
            if self.loss.kind == "sigmoid":
                bias = embedded.scalars[f"{name}_bias"]
                losses[name] = matryoshka_sigmoid(queries, targets, bias=bias, **options)
            else:
                losses[name] = matryoshka_info_nce(queries, targets, **options)
        return losses

    def temperature_of(self, task: str, embedded: Embedded) -> Tensor:
        """The temperature, `[1]`, of a task's loss."""
        return torch.exp(-embedded.scalars["image_text" if self.loss.one_temperature else task])

    def _graded_loss(
        self, queries: Tensor, targets: Tensor, scores: Tensor, temperature: Tensor, group: ProcessGroup | None
    ) -> Tensor:
        scores = to_device(scores, queries.device)
        dims, weights = self.loss.dims, self.loss.weights or None
        return matryoshka_cosent(
            queries, targets, scores, temperature=temperature, dims=dims, weights=weights, group=group
        )

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
        """Accuracy within the batch by loss and dim; the temperatures and biases."""
        accuracies = {
            f"train_accuracy_{name}/{dim}": (forth + back) / 2
            for name, (_, stats) in losses.items()
            if isinstance(stats, LossStats)
            for dim, (forth, back) in zip(
                self.loss.dims,
                torch.stack([stats.query_to_target_accuracy, stats.target_to_query_accuracy], dim=1).tolist(),
                strict=True,
            )
        }
        temperatures = {f"temperature/{name}": value for name, value in self.temperatures(engine).items()}
        biases = {f"bias/{name.removesuffix('_bias')}": engine.whole(b).item() for name, b in self.biases.items()}
        return accuracies | temperatures | biases


class Scalar(nn.Module):
    """A temperature's or bias's parameter as a tensor; a module, as ZeRO 3 makes parameters whole in a forward pass."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__()
        self.parameter = parameter

    def forward(self) -> Tensor:
        return self.parameter.clone()
