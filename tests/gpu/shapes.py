"""The paper's first stage as one of eight ranks: its recipe, model, engine and chunks, or the same in a tiny size.

The eight ranks are PyTorch's "fake" process group: collectives return at once, what they would bring from other ranks
being this rank's own. So memory and computation are those of one rank of eight, communication takes no time, and
weights mean nothing after the first update.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from report import Report
from stage_trainer.batch import Batch
from stage_trainer.build import build_model
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine import Engine, make_engine
from stage_trainer.plan.flops import Flops, StepShape, step_flops
from stage_trainer.plan.memory import Sizes
from stage_trainer.recipe import GradientCache, Recipe
from stage_trainer.recipe.read import load
from stage_trainer.run.environment import quiet
from stage_trainer.run.rendezvous import initialize_distributed
from stage_trainer.tasks.contrastive import forward_backward
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import PackedTokens

RANKS = 8
PAIRS = ("image_text", "text")
CHUNKS = "gradient_cache={images: 256, tokens: 16384}"
_TINY = (
    *(f"model.text.{item}" for item in ("vocab_size=512", "width=64", "layers=2", "heads=2", "mlp_width=128")),
    *(f"model.vision.{item}" for item in ("width=64", "layers=2", "heads=2")),
    *(f"{stage}loss.dims=[64, 32, 16]" for stage in ("", "stages.2.", "stages.3.")),
    "resolution=[[0, 56]]",
    "patch_dropout=[[0, 0.5]]",
    "precision=fp32",
    "gradient_cache={images: 4, tokens: 96}",
    # DeepSpeed fills a bucket of 2 GB by default, at each step.
    "deepspeed={zero_optimization: {stage: 1, reduce_bucket_size: 100000}}",
)


def recipe_of(cuda: bool) -> Recipe:
    overrides = ["model.text_weights=null", "model.vision_weights=null", CHUNKS, *(() if cuda else _TINY)]
    return load("launch/recipes/jina-clip-v2.yaml", overrides, stage=1).recipe


def as_one_of_eight() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, too

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    quiet()
    dist.reduce_scatter_tensor = own_part  # type: ignore[assignment]  # PyTorch 2.11's leaves the output as it was, whatever memory held before
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    initialize_distributed()


def own_part(output: torch.Tensor, whole: torch.Tensor, *_: Any, **__: Any) -> None:
    """What rank 0 gets of a reduction whose other ranks bring nothing."""
    output.copy_(whole[: len(output)])


@dataclass
class Rank:
    """This rank's model and engine. `step` is a training step."""

    recipe: Recipe
    engine: Engine
    model: DualEncoder
    chunks: GradientCache

    @classmethod
    def start(cls, report: Report) -> Rank:
        as_one_of_eight()
        recipe = recipe_of(report.cuda)
        stage = recipe.stage(1)
        assert stage.chunks is not None
        with report.device:
            model = build_model(recipe, 1)
        model.vision.set_resolution(stage.resolution_at(0))
        objective = ContrastiveObjective(model, stage.loss, recipe.precision)
        objective.set_trainable(stage)
        engine = make_engine(
            objective,
            objective.parameter_groups(stage, recipe.optimizer),
            recipe.optimizer,
            precision=recipe.precision,
            deepspeed=stage.deepspeed,
        )
        engine.train()
        return cls(recipe, engine, model, stage.chunks)

    def configure(self, *, checkpointing: bool, compiled: bool, fp8: bool = False) -> None:
        objective = self.engine.objective
        objective.fp8, objective.precision = fp8, "bf16" if fp8 else self.recipe.precision
        for tower in (self.model.text, self.model.vision):
            tower.configure(checkpointing=checkpointing, compile=compiled)

    def batch(self, chunks: int) -> Batch:
        """So many chunks of images, each with a caption, and of tokens: the captions' and half as many text pairs'."""
        images, tokens = self.chunks.images * chunks, self.chunks.tokens * chunks
        pairs = images // 2
        return drawn_batch(images, pairs, tokens // (images + 2 * pairs), self.recipe)

    def forward_backward(self, batch: Batch, cache: GradientCache | None) -> float:
        """The sum of the losses, with gradients left on the parameters."""
        found = forward_backward(
            self.engine, batch, pairs=PAIRS, patch_dropout=self.recipe.stage(1).patch_dropout_at(0),
            group=dist.group.WORLD, cache=cache,
        )  # fmt: skip
        return sum(float(loss.detach()) for loss, _ in found.values())

    def step(self, batch: Batch, cache: GradientCache | None) -> None:
        self.forward_backward(batch, cache)
        if not self.engine.step():
            raise RuntimeError(f"a gradient is not finite. {self.engine.diagnosis()}")
        self.engine.objective.after_step(self.engine)

    def sizes(self, batch: Batch) -> Sizes:
        """For the planner."""
        assert isinstance(batch.texts, PackedTokens)
        texts = len(batch.texts.lengths)
        length = sum(batch.texts.lengths) // texts
        return Sizes(len(batch.image_ids), texts, length, batch.pairs, 0, RANKS)

    def flops(self, batch: Batch, cache: GradientCache | None, checkpointing: bool) -> Flops:
        """This rank's share of a step's operations."""
        vision = replace(self.model.vision.config, checkpointing=checkpointing)
        text = replace(self.model.text.config, checkpointing=checkpointing)
        stage = self.recipe.stage(1)
        shape = StepShape.of(batch, vision, stage.patch_dropout_at(0))
        whole = sum([shape] * (RANKS - 1), start=shape)
        found = step_flops(text, vision, whole, dims=stage.loss.dims, cached=cache is not None)
        return Flops(found.forward // RANKS, found.backward // RANKS, found.recomputed // RANKS)


def drawn_batch(images: int, pairs: int, length: int, recipe: Recipe) -> Batch:
    """Random images, and texts whose lengths spread evenly from half of `length` to one and a half of it."""
    generator = torch.Generator().manual_seed(0)
    texts = images + 2 * pairs
    lengths = [max(2, length // 2 + n * length // max(1, texts - 1)) for n in range(texts)]
    size: Any = recipe.stage(1).resolution_at(0)
    vocabulary = recipe.model.text["vocab_size"]
    assert isinstance(vocabulary, int)
    ids = [torch.randint(4, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return Batch(
        images=torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator),
        image_seeds=torch.arange(images),
        texts=PackedTokens.from_lists(ids),
        text_seeds=torch.arange(texts),
        image_ids=torch.arange(images),
        pairs=pairs,
        negatives=0,
        text_ids=torch.arange(pairs),
    )
