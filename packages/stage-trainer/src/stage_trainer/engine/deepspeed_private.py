"""Every name of DeepSpeed's that its documentation (https://deepspeed.readthedocs.io) does not promise.

Tested with 0.19.8. pyproject.toml asks for 0.19.8 or later, below 0.20; with another version run
`pytest -m "full or not full" tests/stage_trainer/test_rest.py tests/stage_trainer/test_zero_gradients.py` first.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

DeepSpeedEngine = Any
"""What `deepspeed.initialize` returns first; the library is untyped."""


def reduce_on_request(engine: DeepSpeedEngine) -> None:
    """From now on gradients are averaged over ranks by `average_gradients` or `one_reduction` alone."""
    engine.enable_backward_allreduce = False


def set_boundary(engine: DeepSpeedEngine, last: bool) -> None:
    """Says whether the next backward pass is the last one of a step; without ZeRO."""
    engine.set_gradient_accumulation_boundary(last)


def average_gradients(engine: DeepSpeedEngine) -> None:
    """Averages gradients over ranks, zeros for parameters that have none; without ZeRO."""
    engine.allreduce_gradients()


def one_reduction(engine: DeepSpeedEngine) -> AbstractContextManager[None]:
    """Backward passes in this context add up on each rank, and are reduced once on leaving; under ZeRO."""
    context: AbstractContextManager[None] = engine.coalesce_grad_reduction()
    return context


def found_overflow(engine: DeepSpeedEngine) -> bool:
    """Whether the last step was skipped, because a gradient was not finite; under ZeRO."""
    return bool(engine.optimizer.overflow)


def gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """L2 norm of all gradients of the last step, before clipping; None before the first. Under ZeRO."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def link_states(engine: DeepSpeedEngine) -> None:
    """Lets `deepspeed.utils.safe_get_full_optimizer_state` and the like find state that no step made, under
    ZeRO 1 and 2; under 3 they find it anyway."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def zero_3_partitions(engine: DeepSpeedEngine) -> Iterable[tuple[list[nn.Parameter], Tensor]]:
    """(parameters, this rank's part of them in one tensor), for each tensor that ZeRO 3's inner optimizer updates."""
    return zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat, strict=True)


def own_size(parameter: Any) -> int:
    """Number of values that each rank holds of a parameter under ZeRO 3, padding included."""
    return int(parameter.ds_tensor.numel())


def destroy(engine: DeepSpeedEngine) -> None:
    """Removes hooks and frees buffers."""
    engine.destroy()
