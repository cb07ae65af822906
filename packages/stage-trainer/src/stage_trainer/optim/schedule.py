"""The learning rate of each step, and which groups rest in it."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from stage_trainer.optim.groups import let_rest


def schedule(step: int, steps: int, warmup: int, min_ratio: float = 0.0) -> float:
    """The share of the peak rate at `step`: linear warm-up, then cosine to `min_ratio` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float, towers: Collection[str]) -> None:
    """Sets each group's rate for a step, `factor` of its peak. A tower that is not among `towers` has no part in the
    step and rests (`groups.let_rest`, also of an optimizer that `build_optimizer` did not make)."""
    if any("rests" not in group for group in optimizer.param_groups):
        let_rest(optimizer)
    for group in optimizer.param_groups:
        group["rests"] = group["tower"] not in towers and group.get("waits", True)
        group["lr"] = 0.0 if group["rests"] else group["peak_lr"] * factor
