"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) in bfloat16 or float32.

The update is that of `torch.optim.Muon`, which always orthogonalises in bfloat16: rounding there turns a difference of
1e-7 between one process and two into one of 1e-5 within a few steps, so float32 runs need float32 here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stage_trainer.optim.eager import AdamW, Optimizer
from stage_trainer.optim.groups import ParamGroup

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_EPS = 1e-7


class Muon(Optimizer):
    """Momentum, orthogonalised: the update of each weight matrix has singular values that are all about one.

    Args:
        params: matrices `[out, in]`, or groups of them.
        lr: scales the update, times sqrt(max(1, out / in)).
        momentum: of the running mean of gradients; with Nesterov's look-ahead.
        weight_decay: decoupled, as in AdamW.
        dtype: of the orthogonalisation.
        group: ranks that hold the same matrices and gradients, to share the work. None: this process alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        group: Any = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.group = dtype, group
        shapes = {tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2}
        if shapes:
            raise ValueError(f"Muon takes matrices alone; found parameters of shape {sorted(shapes)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        moved = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                if group["lr"]:
                    moved.append((group, parameter))
        for (group, parameter), update in zip(moved, self._updates(moved), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            out, into = parameter.shape
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * max(1, out / into) ** 0.5)

    def _updates(self, moved: list[tuple[ParamGroup, Tensor]]) -> list[Tensor]:
        """The orthogonalised matrices, gathered from all ranks: the same bits whichever rank computed them."""

        def update(group: dict[str, Any], parameter: Tensor) -> Tensor:
            momentum = self.state[parameter]["momentum_buffer"]
            return orthogonalise(parameter.grad.lerp(momentum, group["momentum"]), self.dtype)  # type: ignore[union-attr]

        if self.group is None or not moved:
            return [update(*one) for one in moved]
        parts = share([parameter.shape for _, parameter in moved], torch.distributed.get_world_size(self.group))
        sizes = [sum(moved[i][1].numel() for i in part) for part in parts]
        mine = moved[0][1].new_zeros(max(sizes), dtype=self.dtype)
        rank, start = torch.distributed.get_rank(self.group), 0
        for i in parts[rank]:
            mine[start : start + moved[i][1].numel()] = update(*moved[i]).flatten()
            start += moved[i][1].numel()
        gathered = [torch.empty_like(mine) for _ in parts]
        torch.distributed.all_gather(gathered, mine, group=self.group)
        updates = [mine] * len(moved)
        for part, size, flat in zip(parts, sizes, gathered, strict=True):
            for i, piece in zip(part, torch.split(flat[:size], [moved[i][1].numel() for i in part]), strict=True):
                updates[i] = piece.view(moved[i][1].shape)
        return updates


class MuonWithAdamW(Optimizer):
    """Muon on the groups marked `muon` and torch's AdamW on the others, as one optimizer: DeepSpeed takes only one."""

    def __init__(self, groups: list[ParamGroup], muon: dict[str, Any], adamw: dict[str, Any]):
        matrices = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, **muon))
        if rest:
            self._parts.append(AdamW(rest, **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # The parts read the group dictionaries and keep the state that are seen from outside.
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def share(shapes: list[torch.Size], ranks: int) -> list[list[int]]:
    """Which matrices each rank orthogonalises: the largest first, each to the rank with the least work so far."""
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        min(parts, key=lambda part: sum(costs[j] for j in part)).append(i)
    return parts


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
