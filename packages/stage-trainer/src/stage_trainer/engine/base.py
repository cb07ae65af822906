"""What the engines of all ZeRO stages share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stage_trainer.engine import deepspeed_private
from stage_trainer.engine.protocol import Movable, Objective
from stage_trainer.optim.update_norms import UpdateNorms

Module = TypeVar("Module", bound=nn.Module)


class BaseEngine(ABC):
    """See `protocol.Engine`.

    Args:
        objective: with its weights loaded.
        optimizer: over groups of `optim.groups`.
        config: DeepSpeed's.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]):
        import deepspeed

        self.shell = without_weights(objective.model)  # before DeepSpeed adds its hooks to the modules
        self.objective: Any = objective
        self.optimizer = optimizer
        self.parameters: dict[str, nn.Parameter] = {}
        towers: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            self.parameters |= zip(group["names"], group["params"], strict=True)
            towers.setdefault(group["tower"], []).extend(group["params"])
        self.update_norms = UpdateNorms(towers)
        self._engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=dict(config))
        self.device: torch.device = self._engine.device
        self.world = torch.distributed.get_world_size()
        self._of_frozen: dict[str, Tensor] = {}
        # Gradients are averaged in `backwards`, once it is known which parameters have none.
        deepspeed_private.reduce_on_request(self._engine)
        self._prepare()

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def forward(self, part: Movable, **options: Any) -> Any:
        return self._engine(part.to(self.device), **options)

    def forward_passes(self, own: int) -> int:
        return own

    def forward_share(self) -> tuple[int, int]:
        return torch.distributed.get_rank(), self.world

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        total = numbers.to(self.device, torch.float64, copy=True)
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return total

    def diagnosis(self) -> str:
        return ""

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._of_frozen.items()
        yield from self._states()

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        frozen = {name for name, p in self.objective.model.named_parameters() if not p.requires_grad}
        self._of_frozen = {key: value for key, value in saved.items() if key.rpartition("|")[0] in frozen}
        self._load_states(saved)

    def copy_of_weights(self) -> dict[str, Tensor]:
        with self._gathered(self.objective.parameters()):
            state = self.objective.model.state_dict() if torch.distributed.get_rank() == 0 else {}
            return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def close(self) -> None:
        deepspeed_private.destroy(self._engine)

    def _gathered(
        self, parameters: Iterable[nn.Parameter], modifier_rank: int | None = None
    ) -> AbstractContextManager[object]:
        """Makes parameters whole on every rank; what `modifier_rank` wrote to them is kept on leaving."""
        return nullcontext()

    def _without_gradient(self) -> set[str]:
        """The parameters that have no gradient on any rank: they had no part in the step, and must not change."""
        found = torch.tensor([p.grad is not None for p in self.parameters.values()], dtype=torch.uint8)
        if self.world > 1:
            found = found.to(self.device)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return {name for name, there in zip(self.parameters, found.tolist(), strict=True) if not there}

    @abstractmethod
    def _prepare(self) -> None:
        """What a kind of engine adds, once DeepSpeed has the objective and the optimizer."""

    @abstractmethod
    def _states(self) -> Iterator[tuple[str, Tensor]]:
        """`optimizer_state` of what trains."""

    @abstractmethod
    def _load_states(self, saved: dict[str, Tensor]) -> None:
        """`load_optimizer_state` of what trains."""


def without_weights(model: Module) -> Module:
    """A copy whose parameters and buffers are on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    meta = {id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
            for t in tensors}  # fmt: skip
    return copy.deepcopy(model, meta)
