"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) in a precision of one's choice.

The update of `torch.optim.Muon`, which orthogonalises in bfloat16 whatever the gradients are: rounding there turns a
difference of 1e-7 between one process and two into one of 1e-5 within a few steps, so float32 runs need float32 here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every weight matrix moves by a matrix whose singular values are all about one.

    Args:
        params: matrices `[out, in]`, or groups of them.
        lr: the step's size, times sqrt(max(1, out / in)).
        momentum: of the gradient's running mean, used with Nesterov's look-ahead.
        weight_decay: decoupled, as in AdamW.
        dtype: of the orthogonalisation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        shapes = {tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2}
        if shapes:
            raise ValueError(f"Muon takes matrices alone; found parameters of shape {sorted(shapes)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]), self.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                out, into = parameter.shape
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * max(1, out / into) ** 0.5)


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U Vᵀ of a matrix `[M, N]` = U S Vᵀ, nearly: five steps of a quintic Newton-Schulz iteration, in `dtype`."""
    x = matrix.to(dtype, copy=True)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x.div_(x.norm().clamp(min=_EPS))  # the spectral norm is at most this one
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x
