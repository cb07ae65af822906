"""Makes an engine from parts of a recipe: the only place that looks at the ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stage_trainer.engine.base import Engine, Objective
from stage_trainer.engine.partitioned import PartitionedEngine, Zero3Engine
from stage_trainer.engine.plain import PlainEngine
from stage_trainer.optim.build import build_optimizer
from stage_trainer.optim.eager import AdamW
from stage_trainer.optim.groups import ParamGroup
from stage_trainer.recipe import OptimizerConfig

KINDS: dict[int, Callable[..., Engine]] = {0: PlainEngine, 1: PartitionedEngine, 2: PartitionedEngine, 3: Zero3Engine}
"""By ZeRO stage."""


def make_engine(
    objective: Objective,
    groups: Iterable[ParamGroup],
    config: OptimizerConfig,
    *,
    precision: str,
    deepspeed: Mapping[str, Any],
    saved: dict[str, Tensor] | None = None,
) -> Engine:
    """An engine for a stage.

    Args:
        objective: with its weights loaded.
        groups: its trainable parameters (`optim.groups`), made with the same `saved`.
        config: the recipe's optimizer.
        precision: `bf16` or `fp32`, in which Muon computes.
        deepspeed: the stage's own options of DeepSpeed.
        saved: the optimizer state to continue with, as `optimizer_state` gave it.
    """
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    # ZeRO warns of an optimizer whose type it does not know.
    optimizer = build_optimizer(groups, config, precision, torch.optim.AdamW if stage else AdamW)
    engine = KINDS[stage](objective, optimizer, deepspeed_config(deepspeed, config.gradient_clipping))
    if saved:
        engine.load_optimizer_state(saved)
    return engine


def deepspeed_config(options: Mapping[str, Any], gradient_clipping: float) -> dict[str, Any]:
    """DeepSpeed's configuration: what this trainer needs, and the recipe's own options (`recipe.deepspeed`)."""
    return {
        "steps_per_print": 10**9,
        **options,
        # Batches are made by the sampler; DeepSpeed only requires these numbers to be consistent.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 by default.
        "gradient_clipping": gradient_clipping,
        "zero_allow_untested_optimizer": True,
    }
