"""The optimizer that a recipe names, over parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stage_trainer.optim.eager import AdamW
from stage_trainer.optim.groups import ParamGroup, let_rest
from stage_trainer.optim.muon import MuonWithAdamW
from stage_trainer.recipe import OptimizerConfig


def build_optimizer(
    groups: Iterable[ParamGroup], config: OptimizerConfig, precision: str, kind: type[torch.optim.AdamW] = AdamW
) -> torch.optim.Optimizer:
    """AdamW over all groups, or Muon over those marked for it and AdamW over the rest.

    Args:
        groups: of `optim.groups`.
        config: the recipe's optimizer.
        precision: in which Muon computes.
        kind: of an AdamW over all groups.
    """
    adamw: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    if config.name == "adamw":
        return let_rest(kind(list(groups), **adamw))
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    muon = {
        "momentum": config.muon_momentum,
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        "group": torch.distributed.group.WORLD if several else None,
    }
    return let_rest(MuonWithAdamW(list(groups), muon, adamw))
