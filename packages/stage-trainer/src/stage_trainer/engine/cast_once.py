"""Weights in 16 bits for several forward passes.

Under autocast every pass casts each weight again: its cache of casts ends with its region, compiled blocks cast in
their own graph, and activation checkpointing enters a region of its own in the backward pass. So the casts are made
outside of all of them, and stand in the modules in place of their parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from text_tower.lora import AdaptedLinear
from torch import Tensor, nn


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[list[Tensor]]:
    """Within it, forward and backward passes of a model's Linears take their weights in `dtype`, as autocast would cast
    them; gradients reach the parameters and add up there in float32. Gives the casts.

    The parameters must be whole (not ZeRO 3) and must not change meanwhile. `model.parameters()` is without these.
    """
    taken: list[tuple[Any, str, nn.Parameter]] = []
    casts: list[Tensor] = []
    try:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                with torch.enable_grad():
                    found = module.cast(dtype) if isinstance(module, AdaptedLinear) else _cast(module, dtype)
                for name, value in found.items():
                    taken.append((module, name, module._parameters[name]))  # type: ignore[arg-type]
                    module._parameters[name] = value  # type: ignore[assignment]
                    casts.append(value)
        yield casts
    finally:
        for module, name, parameter in taken:
            module._parameters[name] = parameter
            if isinstance(module, AdaptedLinear):
                module.summed = None


def _cast(module: nn.Linear, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.to(dtype) for name, parameter in module.named_parameters(recurse=False)}
