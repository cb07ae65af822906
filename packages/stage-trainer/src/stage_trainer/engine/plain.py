"""The engine without ZeRO: every rank has all gradients and the whole optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stage_trainer.engine import deepspeed_private
from stage_trainer.engine.base import Engine
from stage_trainer.optim.groups import named_states


class PlainEngine(Engine):
    """ZeRO 0."""

    def _prepare(self) -> None:
        self._norms: dict[str, float] = {}
        self._not_finite: list[str] = []

    @contextmanager
    def backwards(self) -> Iterator[Callable[[Tensor, bool], None]]:
        def backward(loss: Tensor, last: bool) -> None:
            deepspeed_private.set_boundary(self._engine, last)
            self._engine.backward(loss)

        yield backward
        deepspeed_private.set_boundary(self._engine, True)  # where the last chunk had nothing to train
        if self.world > 1:
            without_gradient = self._without_gradient()
            deepspeed_private.average_gradients(self._engine)
            for name in without_gradient:  # DeepSpeed gave them zeros
                self.parameters[name].grad = None

    def step(self) -> bool:
        towers = self.update_norms.towers.items()
        gradients = {tower: [p.grad for p in of_tower if p.grad is not None] for tower, of_tower in towers}
        norms = {tower: nn.utils.get_total_norm(found) for tower, found in gradients.items() if found}
        self._norms = dict(zip(norms, torch.stack(list(norms.values())).tolist() if norms else (), strict=True))
        if all(math.isfinite(norm) for norm in self._norms.values()):
            self._engine.step()
            return True
        trained = self.parameters.items()
        self._not_finite = [n for n, p in trained if p.grad is not None and not p.grad.isfinite().all()]
        self._engine.zero_grad()
        return False

    def diagnosis(self) -> str:
        if not self._not_finite:
            return ""
        first = self._not_finite[0]
        return f"That holds for {len(self._not_finite)} of {len(self.parameters)} parameters, the first {first}."

    def gradient_norms(self) -> dict[str, float]:
        return self._norms

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def clamp_(self, parameter: nn.Parameter, *, max: float) -> None:
        with torch.no_grad():
            parameter.clamp_(max=max)

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for name, _, state in named_states(self.optimizer):
            for key, value in state.items():
                yield f"{name}|{key}", value if torch.is_tensor(value) else torch.tensor(float(value))

    def _load_states(self, saved: dict[str, Tensor]) -> None:
        states = {name: (parameter, state) for name, parameter, state in named_states(self.optimizer)}
        for full_name, value in saved.items():
            name, _, key = full_name.rpartition("|")
            if name in states:
                parameter, state = states[name]
                state[key] = value.to(parameter.device).clone()
