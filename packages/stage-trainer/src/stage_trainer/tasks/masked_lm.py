"""Masked-language-model training of the text tower alone.

The loss is the mean cross entropy over the hidden tokens of all ranks. Ranks hide different numbers of them, so it is a
sum over a sum, not a mean of means; the gradients, too, are those of one process, however the batch is divided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from text_tower import MaskedLM, TextTower, TextTowerConfig, Tokenizer
from text_tower.masked_lm import MaskedLoss
from torch import Tensor, nn

from stage_trainer import weights
from stage_trainer.batch import MaskedBatch
from stage_trainer.build import check_settled, named_weights, tower_config, with_tokenizer
from stage_trainer.data.masked import MaskedTexts
from stage_trainer.data.texts import TextBatches
from stage_trainer.engine import Engine
from stage_trainer.evaluation.measures import MASKED_LM, of_masked_lm
from stage_trainer.optim.groups import ParameterGroups
from stage_trainer.plan.flops import StepShape, masked_lm_flops
from stage_trainer.recipe import ModelConfig, OptimizerConfig, Stage
from stage_trainer.tasks.task import HEALTH_CHARTS, Charts, Losses, Measured, Task, TrainedObjective, Validation


class MaskedLMTask(Task):
    charts: ClassVar[Charts] = {
        "what matters": {
            "loss on hidden words": ["^loss/"],
            "held out: loss on hidden words, all languages": ["^validation_loss_masked_lm/all$"],
            "learning rate": ["^learning_rate_"],
            "text tokens a second": ["^speed/text_tokens_per_second$"],
        },
        "is it well": {"held out: loss on hidden words by language": ["^validation_loss_masked_lm/"], **HEALTH_CHARTS},
    }
    cuts_texts = False  # a window is drawn from a long text

    def check_configs(self, fetch: bool = False) -> None:
        # The stages before are of this task, too; those after get adapters and an image tower.
        config = masked_lm_config(self.recipe.model, fetch)
        check_settled(self.recipe, self.recipe.stages[: self.number], config, None, fetch)

    def build_model(self, tokenizer: Tokenizer | None = None) -> MaskedLM:
        model = _build(self.recipe.model)
        with_tokenizer(model.tower, tokenizer, self.recipe.model)
        return model

    def load_model(self, path: Path) -> MaskedLM:
        return _build(dataclasses.replace(self.recipe.model, text_weights=str(path)))

    def empty_model(self) -> MaskedLM:
        with torch.device("meta"):
            return MaskedLM(TextTower(masked_lm_config(self.recipe.model)))

    def parameter_counts(self, model: nn.Module) -> list[tuple[int, str]]:
        assert isinstance(model, MaskedLM)
        parts = [
            (model.tower, "text"),
            (model.lm_head, "head, without the word table that it shares with the text tower"),
            (model, "together"),
        ]
        return [(sum(p.numel() for p in module.parameters()), what) for module, what in parts]

    def make_objective(self, model: MaskedLM) -> MaskedLMObjective:
        return MaskedLMObjective(model, self.recipe.precision)

    def make_batches(self, tokenizer: Tokenizer, rank: int, world: int) -> TextBatches[MaskedBatch]:
        texts = MaskedTexts(self.data, self.stage, "train", tokenizer)
        return TextBatches(texts, self.stage, self.seed, rank, world)

    def forward_backward(self, engine: Engine, batch: MaskedBatch, step: int) -> Losses:
        return forward_backward(engine, batch, self.chunks.tokens if self.chunks else 0)

    def operations(self, engine: Engine, batch: MaskedBatch, step: int, tokens: int, squared_tokens: int) -> int:
        hidden = round(self.stage.masking.share * tokens)  # the expected number; counting would wait for the device
        shape = StepShape(texts=self.stage.batch.masked_lm, tokens=tokens, squared_tokens=squared_tokens)
        return masked_lm_flops(engine.objective.model.tower.config, shape, hidden).model

    def make_validation(self, engine: Engine, tokenizer: Tokenizer) -> Validation | None:
        """The loss on hidden words of the validation split, by language and over all; None if there is no such data."""
        if not (batches := MaskedTexts(self.data, self.stage, "validation", tokenizer).held_out()):
            return None

        def run(last: bool, before_batch: Callable[[], None]) -> Measured:
            engine.train(False)
            tokens = self.chunks.tokens if self.chunks else 0
            losses = held_out_losses(engine, batches, tokens=tokens, before_batch=before_batch)
            values = {f"{MASKED_LM}/{name}": loss for name, loss in losses.items()}
            return Measured(values, [f"{losses['all']:.3f} nats a hidden token of held-out texts"])

        return Validation(of_masked_lm(batches), run)

    def title(self, step: int) -> str:
        return "hidden words"


class MaskedLMObjective(TrainedObjective):
    """Predicts the hidden words of a batch.

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

    def forward(self, batch: MaskedBatch) -> MaskedLoss:
        with torch.autocast(batch.seeds.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss: MaskedLoss = self.model(batch.masked, sample_seeds=batch.seeds)
        return loss

    def figures(self, engine: Engine, losses: Losses) -> dict[str, float]:
        return {f"perplexity/{name}": loss.exp().item() for name, (loss, _) in losses.items()}


def forward_backward(engine: Engine, batch: MaskedBatch, tokens: int = 0) -> Losses:
    """Leaves the gradients of the loss over the global batch on the parameters; returns {"masked_lm": (loss in nats a
    hidden token, hidden tokens)}, both 0-d, over all ranks.

    Args:
        engine: runs a `MaskedLMObjective`.
        batch: this rank's part, on the host.
        tokens: most tokens of one forward and backward pass (0: all at once).
    """
    chunks = list(batch.chunks(tokens))
    own = len(chunks)
    # Under ZeRO 3 all ranks run the same number of passes; those beyond a rank's own chunks have weight 0.
    chunks += chunks[:1] * (engine.forward_passes(own) - own)
    hidden = engine.sum_over_ranks(torch.tensor(len(batch.masked.labels))).clamp(min=1)
    sums = []
    with engine.backwards() as backward, engine.cast_once():
        for number, chunk in enumerate(chunks):
            total = engine.forward(chunk).total * (number < own)
            # Gradients are averaged over ranks, and a sum is needed: hence the factor world size.
            backward(total * (engine.world / hidden).to(total.dtype), number == len(chunks) - 1)
            sums.append(total.detach())
    return {"masked_lm": (engine.sum_over_ranks(torch.stack(sums).sum()) / hidden, hidden)}


@torch.no_grad()
def held_out_losses(
    engine: Engine,
    batches: Mapping[str, MaskedBatch],
    *,
    tokens: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Nats a hidden token by language, and over all of them as "all"; every rank has to call, and does a share.

    Args:
        tokens: most of one forward pass (0: all at once).
        before_batch: called before each of the batches, on every rank for all of them.
    """
    share, shares = engine.forward_share()
    sums = torch.zeros(2, len(batches), dtype=torch.float64)
    for number, batch in enumerate(batches.values()):
        before_batch()
        if number % shares == share:
            for chunk in batch.chunks(tokens):
                total, hidden = engine.forward(chunk)
                sums[:, number] += torch.tensor([total.item(), hidden], dtype=torch.float64)
    if shares > 1:
        sums = engine.sum_over_ranks(sums).cpu()
    totals, counts = sums
    by_language = (totals / counts.clamp(min=1)).tolist()
    return {**dict(zip(batches, by_language, strict=True)), "all": float(totals.sum() / counts.sum())}


def masked_lm_config(model: ModelConfig, fetch: bool = False) -> TextTowerConfig:
    """The text tower's configuration in a stage of this task: adapters and a projector come later."""
    later = ("adapters", "lora_rank", "lora_alpha", "projector", "projector_hidden", "truncate_dim")
    plain = {k: v for k, v in model.text.items() if k not in later}
    config: TextTowerConfig = tower_config(dataclasses.replace(model, text=plain), "text", fetch)
    return config


def _build(model: ModelConfig) -> MaskedLM:
    config = masked_lm_config(model, fetch=True)
    with named_weights(model, "text"):
        path = weights.tower_weights(model, "text", fetch=True)
        if path is None:
            return MaskedLM(TextTower(config))
        options: dict[str, Any] = weights.reading_options(config, weights.given(path, "text")[0])
        return MaskedLM.from_pretrained(path, **options)
