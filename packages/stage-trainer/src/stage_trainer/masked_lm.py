"""Masked-language-model training of the text tower alone: batches, objective, step and held-out loss.

The loss is the mean cross entropy over the hidden tokens of all ranks. Ranks hide different numbers of them, so it is a
sum over a sum, not a mean of means; the gradients, too, are those of one process, however the batch is cut up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from text_tower import MaskedLM
from text_tower.masked_lm import MaskedLoss
from torch import Tensor, nn

from stage_trainer.batch import MaskedBatch
from stage_trainer.recipe import Stage

MaskedLosses = dict[str, tuple[Tensor, Tensor]]
"""{"masked_lm": (loss in nats a hidden token, hidden tokens)}, both 0-d, over all ranks."""


class HiddenWords(nn.Module):
    """Predicts the hidden words of a batch, for DeepSpeed to run.

    Args:
        model: the tower with its head.
        precision: `bf16` computes in bfloat16 (torch.autocast); parameters and the loss stay float32.
    """

    def __init__(self, model: MaskedLM, precision: str):
        super().__init__()
        self.model, self.precision = model, precision
        self.logit_scales: dict[str, nn.Parameter] = {}

    def set_trainable(self, stage: Stage) -> None:
        self.model.requires_grad_(True)

    def forward(self, batch: MaskedBatch) -> MaskedLoss:
        with torch.autocast(batch.seeds.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(batch.masked, sample_seeds=batch.seeds)

    def figures(self, losses: MaskedLosses) -> dict[str, float]:
        """What a monitor shows beside the loss."""
        return {f"perplexity/{task}": loss.exp().item() for task, (loss, _) in losses.items()}


class MaskedEngine(Protocol):
    """What a step needs of an engine."""

    world: int

    def predict(self, batch: MaskedBatch) -> MaskedLoss:
        """The objective's forward pass, on the engine's device."""

    def backwards(self) -> AbstractContextManager[Callable[[Tensor, bool], None]]:
        """Yields backward(loss, last); gradients of all calls add up, and are then averaged over ranks."""

    def forward_passes(self, mine: int) -> int:
        """How many forward passes this rank shall run, if its own part of the batch takes `mine`."""

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """float64, on the engine's device."""


def forward_backward(engine: MaskedEngine, batch: MaskedBatch, tokens: int = 0) -> MaskedLosses:
    """Leaves the gradients of the loss over the global batch on the parameters; returns that loss.

    Args:
        engine: predicts and goes backward.
        batch: this rank's part, on the host.
        tokens: most tokens of one forward and backward pass (0: all at once).
    """
    chunks = list(batch.chunks(tokens))
    own = len(chunks)
    # What is beyond a rank's own chunks is run for the other ranks' sake, and weighs nothing.
    chunks += chunks[:1] * (engine.forward_passes(own) - own)
    hidden = engine.sum_over_ranks(torch.tensor(len(batch.masked.labels))).clamp(min=1)
    sums = []
    with engine.backwards() as backward:
        for number, chunk in enumerate(chunks):
            total = engine.predict(chunk).total * (number < own)
            # The world's size makes good that gradients are averaged over ranks: those of a sum are wanted.
            backward(total * (engine.world / hidden).to(total.dtype), number == len(chunks) - 1)
            sums.append(total.detach())
    return {"masked_lm": (engine.sum_over_ranks(torch.stack(sums).sum()) / hidden, hidden)}


@torch.no_grad()
def held_out_losses(
    engine: MaskedEngine, batches: dict[str, MaskedBatch], *, rank: int, world: int, tokens: int = 0
) -> dict[str, float]:
    """Nats a hidden token by language, and over all of them as "all"; with `world` > 1 each rank does a part."""
    sums = torch.zeros(2, len(batches), dtype=torch.float64)
    for number, batch in enumerate(batches.values()):
        if number % world == rank:
            for chunk in batch.chunks(tokens):
                total, hidden = engine.predict(chunk)
                sums[:, number] += torch.tensor([total.item(), hidden], dtype=torch.float64)
    if world > 1:
        sums = engine.sum_over_ranks(sums).cpu()
    totals, counts = sums
    by_language = (totals / counts.clamp(min=1)).tolist()
    return {**dict(zip(batches, by_language, strict=True)), "all": float(totals.sum() / counts.sum())}
