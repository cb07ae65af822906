"""Contrastive training of both towers: pairs of images and captions, pairs and triplets of texts."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from text_tower import Tokenizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from vision_tower import resample_optimizer_state

from stage_trainer.batch import Batch
from stage_trainer.build import build_model, check_configs, empty_model, load_model
from stage_trainer.data.batches import StageBatches
from stage_trainer.data.frozen_images import inference_of
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine import Engine
from stage_trainer.plan.auto import Choice, choose
from stage_trainer.plan.flops import StepShape, kept_patches, step_flops
from stage_trainer.recipe import GradientCache
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from stage_trainer.tasks.frozen_text import keep_texts
from stage_trainer.tasks.frozen_tower import Pass, Phase, keep_embeddings
from stage_trainer.tasks.gradient_cache import backward_through_chunks, total
from stage_trainer.tasks.pools import PoolValidation
from stage_trainer.tasks.task import HEALTH_CHARTS, Charts, Losses, Task, TrainedObjective, Validation


class ContrastiveTask(Task):
    charts: ClassVar[Charts] = {
        "what matters": {
            "loss": ["^loss/"],
            "held out: recall and nDCG, mean over languages": [
                "^validation_(recall|ndcg)_at_5_[^/]+/[^/]+$",
                "^validation_ndcg_at_10_[^/]+/mean$",
            ],
            "temperature": ["^temperature/"],
            "learning rate": ["^learning_rate_"],
            "samples a second": ["^speed/samples_per_second$"],
        },
        "is it well": {
            "found within the batch, by dim": ["^train_accuracy_"],
            **HEALTH_CHARTS,
            "share of the texts that max_tokens cuts": ["^texts_cut/"],
        },
    }

    def check_configs(self, fetch: bool = False) -> None:
        check_configs(self.recipe, self.number, fetch)

    def build_model(self, tokenizer: Tokenizer | None = None) -> DualEncoder:
        return build_model(self.recipe, self.number, tokenizer)

    def load_model(self, path: Path) -> DualEncoder:
        return load_model(self.recipe, self.number, path)

    def load_former_model(self, path: Path, tokenizer: Tokenizer) -> DualEncoder:
        """Of a stage that trained the text tower alone, that tower's weights, and a new vision tower."""
        if (path / "text").is_dir():
            return self.load_model(path)
        model = dataclasses.replace(self.recipe.model, text_weights=str(path))
        return build_model(dataclasses.replace(self.recipe, model=model), self.number, tokenizer)

    def empty_model(self) -> DualEncoder:
        return empty_model(self.recipe, self.number)

    def parameter_counts(self, model: nn.Module) -> list[tuple[int, str]]:
        assert isinstance(model, DualEncoder)
        text, vision = (sum(p.numel() for p in tower.parameters()) for tower in (model.text, model.vision))
        grid = " × ".join(map(str, model.vision.config.grid))
        with_adapter = " with adapter" if model.vision.config.lora_rank else ""
        return [
            (text, "text with adapter" if model.text.config.adapters else "text"),
            (vision, f"vision{with_adapter} at {self.stage.resolution[-1][1]} px, a grid of {grid} patches"),
            (text + vision, "together, without the two temperatures"),
        ]

    def set_up_segment(self, model: nn.Module, step: int, optimizer: dict[str, Tensor] | None) -> int:
        """Sets the resolution; it changes at the step that is returned."""
        assert isinstance(model, DualEncoder)
        set_resolution(model, self.stage.resolution_at(step), optimizer)
        return min([start for start, _ in self.stage.resolution if start > step] + [self.stage.steps])

    def prepare(self, model: nn.Module, batches: StageBatches, device: torch.device, phase: Phase) -> None:
        """Tells how images come to their size; makes their embeddings, where the tower is frozen and they are kept."""
        assert isinstance(model, DualEncoder)
        batches.inference = inference_of(model.vision.config)
        if "text" in self.stage.stored:
            keep_texts(model.text, batches, self.stage, self.recipe.precision, phase)
        if "image" in self.stage.stored:
            resolution = model.vision.config.resolution
            assert isinstance(resolution, int)  # a stage's, as set_up_segment set it
            keep_embeddings(model.vision, batches, self.stage, Pass(resolution, self.recipe.precision, device), phase)

    def choose_chunks(self, start: int, stop: int, device: torch.device) -> Choice | None:
        if self.stage.gradient_cache != "auto" and device.type != "cuda":
            return None
        choice = choose(self.recipe, self.number, start, stop, device)
        self.chunks = choice.cache
        return choice

    def make_objective(self, model: DualEncoder) -> TrainedObjective:
        return ContrastiveObjective(model, self.stage.loss, self.recipe.precision)

    def make_batches(self, tokenizer: Tokenizer, rank: int, world: int) -> StageBatches:
        return StageBatches(self.data, self.stage, self.seed, tokenizer, rank, world)

    def towers_at(self, step: int) -> tuple[str, ...]:
        kinds, unread = self.stage.batch_at(step), self.stage.unread
        texts = "text" in kinds or "captions" not in unread
        images = "image_text" in kinds and "images" not in unread
        return ("text",) * texts + ("image",) * images

    def forward_backward(self, engine: Engine, batch: Batch, step: int) -> Losses:
        return forward_backward(
            engine,
            batch,
            pairs=tuple(self.stage.batch_at(step)),
            patch_dropout=self.stage.patch_dropout_at(step),
            # Ranks see different samples but one group: losses are over the global batch.
            group=torch.distributed.group.WORLD if engine.world > 1 else None,
            cache=self.chunks,
        )

    def operations(self, engine: Engine, batch: Batch, step: int, tokens: int, squared_tokens: int) -> int:
        model, stage = engine.objective.model, self.stage
        images, captions, pairs = stage.counts(tuple(stage.batch_at(step)))
        shape = StepShape(
            images=images * (1 + stage.loss.views + batch.image_negatives),
            kept_patches=kept_patches(model.vision.config, stage.patch_dropout_at(step)),
            texts=captions + pairs * (2 + batch.negatives),
            tokens=tokens,
            squared_tokens=squared_tokens,
            pairs=pairs,
            negatives=batch.negatives,
            unified=stage.loss.unified_pairs(images, pairs),
            stored=stage.stored,
            image_negatives=batch.image_negatives,
            replaced=stage.replaced,
            related=stage.taught(images, captions, pairs, batch.negatives) if stage.relational else (),
        )
        text, vision = model.text.config, model.vision.config
        return step_flops(text, vision, shape, trainable=stage.trainable, dims=stage.loss.dims).model

    def make_validation(self, engine: Engine, tokenizer: Tokenizer) -> Validation:
        pools = PoolValidation(self.data, self.recipe.evaluation.pools, engine)
        return Validation(pools.measures, pools.run)

    def title(self, step: int) -> str:
        return f"{self.stage.resolution_at(step)} px"


def forward_backward(
    engine: Engine,
    batch: Batch,
    *,
    pairs: tuple[str, ...],
    patch_dropout: float = 0.0,
    group: ProcessGroup | None = None,
    cache: GradientCache | None = None,
) -> Losses:
    """Leaves the gradients of the sum of the losses on the parameters; returns the losses and their statistics.

    Args:
        engine: runs a `ContrastiveObjective`.
        batch: this rank's part of the global batch, on the host.
        pairs: the kinds that take part ("image_text", "text").
        patch_dropout: share of the patches that images lose.
        group: the ranks whose parts make the global batch.
        cache: sizes of the chunks for gradient caching; None: no caching.
    """
    losses_of = partial(engine.objective.losses, batch=batch, pairs=pairs, group=group)
    if cache:
        return backward_through_chunks(engine, batch, losses_of, cache, patch_dropout=patch_dropout)
    with engine.backwards() as backward, engine.cast_once() if engine.objective.fp8 else nullcontext():
        losses: Losses = losses_of(engine.forward(batch, patch_dropout=patch_dropout))
        backward(total(losses), True)
    return losses


def set_resolution(model: DualEncoder, pixels: int, optimizer: dict[str, Tensor] | None = None) -> None:
    """Changes the vision tower's resolution, and resamples the moments of its position table with it."""
    old, prefix = model.vision.config.grid, "vision.pos_embed|"
    model.vision.set_resolution(pixels)
    if optimizer:
        moments = {name.removeprefix(prefix): v for name, v in optimizer.items() if name.startswith(prefix)}
        moments = resample_optimizer_state(moments, old, model.vision.config.grid)
        optimizer.update({prefix + name: value for name, value in moments.items()})
