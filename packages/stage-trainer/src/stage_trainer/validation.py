"""What a run measures on held-out data while it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from text_tower import Tokenizer

from stage_trainer import retrieval
from stage_trainer.engine import Engine
from stage_trainer.masked_data import held_out
from stage_trainer.masked_lm import held_out_losses
from stage_trainer.monitor import Monitor
from stage_trainer.recipe import Recipe, Stage

Validation = Callable[[Monitor, int, int, int], None]
"""Measures and shows, given (monitor, steps done, rank, world); every rank has to call."""


def validation(recipe: Recipe, stage: Stage, engine: Engine, tokenizer: Tokenizer) -> Validation | None:
    """What the stage measures, or None if it measures nothing.

    Raises:
        UserError: held-out data that is missing or damaged.
    """
    if not recipe.evaluation.every:
        return None
    return _masked_lm(recipe, stage, engine, tokenizer) if stage.masked else _recall(recipe, engine)


def _recall(recipe: Recipe, engine: Engine) -> Validation:
    """Recall@5 on the validation pools, mean over languages, at the full width."""
    pools = [retrieval.Pool.open(Path(recipe.corpus) / "validation" / p) for p in recipe.evaluation.pools]

    def validate(monitor: Monitor, step: int, rank: int, world: int) -> None:
        model = engine.objective.model
        model.eval()
        share = (rank, world) if engine.zero < 3 else (0, 1)  # under ZeRO 3 all ranks must run the same forward passes
        for pool in pools:
            embedded = retrieval.embed(model, pool, rank=share[0], world=share[1])
            if rank == 0:
                recalls, _ = retrieval.score(pool, embedded, [model.text.config.width])
                values = {d: next(iter(by_dim.values()))["mean"] for d, by_dim in recalls.items() if by_dim}
                for direction, value in values.items():
                    name = f"validation_recall_at_5_{pool.name}/{direction.replace('→', ' to ')}"
                    monitor.scalar(name, value, step - 1)
                monitor.say(f"step {step}: {pool.name} " + ", ".join(f"{d} {v:.1%}" for d, v in values.items()))

    return validate


def _masked_lm(recipe: Recipe, stage: Stage, engine: Engine, tokenizer: Tokenizer) -> Validation | None:
    """The loss on hidden words of the validation split, by language and over all; None if there is no such data."""
    if not (batches := held_out(recipe, stage, tokenizer)):
        return None
    tokens = stage.gradient_cache.tokens if stage.gradient_cache else 0

    def validate(monitor: Monitor, step: int, rank: int, world: int) -> None:
        engine.engine.eval()
        share = (rank, world) if engine.zero < 3 else (0, 1)  # as above
        losses = held_out_losses(engine, batches, rank=share[0], world=share[1], tokens=tokens)
        for name, loss in losses.items():
            monitor.scalar(f"validation_loss_masked_lm/{name}", loss, step - 1)
        monitor.say(f"step {step}: {losses['all']:.3f} nats a hidden token of held-out texts")

    return validate
