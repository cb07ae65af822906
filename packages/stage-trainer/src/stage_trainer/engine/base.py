"""What the trainer and the tasks see of an engine, whatever the ZeRO stage, and what the engines share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stage_trainer.batch import Uploadable
from stage_trainer.engine import deepspeed_private
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.engine.float8 import in_float8
from stage_trainer.engine.upload import Uploader
from stage_trainer.optim.update_norms import UpdateNorms

Module = TypeVar("Module", bound=nn.Module)


class Objective(nn.Module):
    """A module for an engine to run: what a task computes from its model.

    Attributes:
        model: what a checkpoint holds. All parameters are its own.
        precision: `bf16` (under autocast) or `fp32`.
        fp8: whether, in bf16, the blocks of its towers multiply in 8 bits (`engine.float8`).
    """

    model: nn.Module
    precision: str
    fp8: bool = False


class Engine(ABC):
    """An objective and its optimizer, on this rank, under DeepSpeed.

    Args:
        objective: what the engine runs, with its weights loaded.
        optimizer: over groups of `optim.groups`.
        config: DeepSpeed's.

    Attributes:
        device: of the parameters.
        upload: copies a part of a batch to the device; what is there already stays as it is.
        world: number of ranks.
        parameters: the trainable ones, by name in the model; under ZeRO 3 partitioned.
        update_norms: of whole parameters; under ZeRO 3 it measures nothing.
        shell: a copy of the model on the meta device, to load a checkpoint's weights into.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]):
        import deepspeed

        self.shell = without_weights(objective.model)  # before DeepSpeed adds its hooks to the modules
        self.objective: Any = objective  # each task knows the type of its own
        self.optimizer = optimizer
        self.parameters: dict[str, nn.Parameter] = {}
        towers: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            self.parameters |= zip(group["names"], group["params"], strict=True)
            towers.setdefault(group["tower"], []).extend(group["params"])
        self.update_norms = UpdateNorms(towers)
        self._engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=dict(config))
        self.device: torch.device = self._engine.device
        self.upload = Uploader(self.device)
        self.world = torch.distributed.get_world_size()
        self._of_frozen: dict[str, Tensor] = {}
        # Gradients are averaged in `backwards`, once it is known which parameters have none.
        deepspeed_private.reduce_on_request(self._engine)
        self._prepare()

    def train(self, mode: bool = True) -> None:
        """Switches between training and evaluation, as `nn.Module.train`."""
        self._engine.train(mode)

    def forward(self, part: Uploadable[object], **options: Any) -> Any:
        """Uploads a part of a batch and returns the objective's output for it, given `options`."""
        return self._engine(self.upload(part), **options)

    def forward_passes(self, own: int) -> int:
        """How many forward passes this rank must run in a step, if its own part of the batch takes `own`: under ZeRO 3
        as many as any rank, because each pass gathers the weights from all ranks."""
        return own

    def forward_share(self) -> tuple[int, int]:
        """(i, n): of forward passes outside a step this rank may run the i-th of n shares. Under ZeRO 3 (0, 1), since
        all ranks have to run the same ones."""
        return torch.distributed.get_rank(), self.world

    def cast_once(self) -> AbstractContextManager[object]:
        """For passes with the same weights, to be left before `backwards` is: in bf16 these are cast once for all of
        them, not under ZeRO 3, where a weight is whole only while its module computes. With `fp8` all passes of a step
        have to be within it."""
        if self.objective.precision != "bf16":
            return nullcontext()
        return in_float8(self.objective) if self.objective.fp8 else cast_once(self.objective)

    @abstractmethod
    def backwards(self) -> AbstractContextManager[Callable[[Tensor, bool], None]]:
        """Yields `backward(loss, last)`, to be called once or several times for one step; `last` marks the last one.

        Gradients of all calls add up on each rank; on leaving they are averaged over ranks, once.
        """

    @abstractmethod
    def step(self) -> bool:
        """Updates the parameters, unless a gradient is not finite: then everything stays as it is and the gradients are
        dropped. Returns whether it updated, the same on every rank.

        Raises:
            UserError: under ZeRO, a group of which only some parameters have a gradient.
        """

    def diagnosis(self) -> str:
        """Where a gradient of the last skipped step was not finite, as a sentence; "" if that is not known."""
        return ""

    @abstractmethod
    def gradient_norms(self) -> dict[str, float]:
        """L2 norms of the last step's gradients before clipping: by tower, or under ZeRO over "all"."""

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """The sum, float64 on the device; every rank has to call."""
        total = numbers.to(self.device, torch.float64, copy=True)
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return total

    @abstractmethod
    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's full value, float32; every rank has to call."""

    @abstractmethod
    def clamp_(self, parameter: nn.Parameter, *, max: float) -> None:
        """Limits a trainable parameter's values from above, in ZeRO's own copy too; every rank has to call."""

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """("parameter name|key", full tensor) of every optimizer state, frozen parameters' included: with this a run
        continues with another world size, ZeRO stage or resolution. Every rank has to iterate.

        Parameters that were never updated have none, as in torch.
        """
        yield from self._of_frozen.items()
        yield from self._states()

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        """Restores what `optimizer_state` gave, for every parameter in `saved`; state of frozen ones is kept for the
        stage that trains them.

        Raises:
            ValueError: parameters of one group made different numbers of steps; groups that are made with `saved` keep
                them apart.
        """
        frozen = {name for name, p in self.objective.model.named_parameters() if not p.requires_grad}
        self._of_frozen = {key: value for key, value in saved.items() if key.rpartition("|")[0] in frozen}
        self._load_states(saved)

    def copy_of_weights(self) -> dict[str, Tensor]:
        """A copy of the model's state dict in main memory on rank 0, empty elsewhere; every rank has to call."""
        with self._gathered(self.objective.parameters()):
            state = self.objective.model.state_dict() if torch.distributed.get_rank() == 0 else {}
            return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def close(self) -> None:
        """Removes DeepSpeed's hooks and frees its buffers; the engine cannot be used afterwards."""
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
