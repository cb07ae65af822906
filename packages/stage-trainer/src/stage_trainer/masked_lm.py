"""Masked-language-model training of the text tower alone: batches, objective, step and held-out loss.

The loss is the mean cross entropy over the hidden tokens of all ranks. Ranks hide different numbers of them, so it is a
sum over a sum, not a mean of means; the gradients, too, are those of one process, however the batch is cut up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from text_tower import MaskedLM, MaskedTokens
from text_tower.masked_lm import MaskedLoss
from torch import Tensor

from stage_trainer.engine import Engine, Objective
from stage_trainer.optimizer.groups import ParameterGroups
from stage_trainer.recipe import Optimizer as OptimizerConfig
from stage_trainer.recipe import Stage
from stage_trainer.step import packed_chunks

MaskedLosses = dict[str, tuple[Tensor, Tensor]]
"""{"masked_lm": (loss in nats a hidden token, hidden tokens)}, both 0-d, over all ranks."""


@dataclass(frozen=True)
class MaskedBatch:
    """One rank's part of a global batch of N texts with hidden words, or a chunk of it.

    Attributes:
        masked: the texts, and what was hidden in them.
        seeds: `[N]` int64, for dropout.
    """

    masked: MaskedTokens
    seeds: Tensor

    def to(self, device: torch.device) -> MaskedBatch:
        return MaskedBatch(self.masked.to(device, non_blocking=True), self.seeds.to(device, non_blocking=True))

    def chunks(self, tokens: int) -> Iterator[MaskedBatch]:
        """Consecutive texts with at most `tokens` tokens (0: all in one); a longer text is a chunk of its own."""
        places, labels = self.masked.places, self.masked.labels
        for rows, span, packed in packed_chunks(self.masked.packed, tokens):
            inside = (places >= span.start) & (places < span.stop)
            yield MaskedBatch(MaskedTokens(packed, places[inside] - span.start, labels[inside]), self.seeds[rows])


class HiddenWords(Objective):
    """Predicts the hidden words of a batch, for DeepSpeed to run.

    Args:
        model: the tower with its head.
        precision: `bf16` computes in bfloat16 (torch.autocast); parameters and the loss stay float32.
    """

    model: MaskedLM

    def __init__(self, model: MaskedLM, precision: str):
        super().__init__()
        self.model, self.precision = model, precision

    def set_trainable(self, stage: Stage) -> None:
        self.model.requires_grad_(True)

    def parameter_groups(
        self, stage: Stage, config: OptimizerConfig, saved: Mapping[str, Tensor] | None = None
    ) -> ParameterGroups:
        groups = ParameterGroups(config, saved)
        groups.add_tower("text", self.model, prefix="", lr=stage.lr.text, layer_decay=stage.layer_decay.text)
        return groups

    def after_step(self, engine: Engine) -> None:
        """There is no temperature to limit."""

    def temperatures(self, engine: Engine) -> dict[str, float]:
        return {}

    def forward(self, batch: MaskedBatch) -> MaskedLoss:
        with torch.autocast(batch.seeds.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(batch.masked, sample_seeds=batch.seeds)

    def figures(self, losses: MaskedLosses) -> dict[str, float]:
        """What a monitor shows beside the loss."""
        return {f"perplexity/{task}": loss.exp().item() for task, (loss, _) in losses.items()}


def forward_backward(engine: Engine, batch: MaskedBatch, tokens: int = 0) -> MaskedLosses:
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
            total = engine.forward(chunk).total * (number < own)
            # The world's size makes good that gradients are averaged over ranks: those of a sum are wanted.
            backward(total * (engine.world / hidden).to(total.dtype), number == len(chunks) - 1)
            sums.append(total.detach())
    return {"masked_lm": (engine.sum_over_ranks(torch.stack(sums).sum()) / hidden, hidden)}


@torch.no_grad()
def held_out_losses(
    engine: Engine, batches: dict[str, MaskedBatch], *, rank: int, world: int, tokens: int = 0
) -> dict[str, float]:
    """Nats a hidden token by language, and over all of them as "all"; with `world` > 1 each rank does a part."""
    sums = torch.zeros(2, len(batches), dtype=torch.float64)
    for number, batch in enumerate(batches.values()):
        if number % world == rank:
            for chunk in batch.chunks(tokens):
                total, hidden = engine.forward(chunk)
                sums[:, number] += torch.tensor([total.item(), hidden], dtype=torch.float64)
    if world > 1:
        sums = engine.sum_over_ranks(sums).cpu()
    totals, counts = sums
    by_language = (totals / counts.clamp(min=1)).tolist()
    return {**dict(zip(batches, by_language, strict=True)), "all": float(totals.sum() / counts.sum())}
