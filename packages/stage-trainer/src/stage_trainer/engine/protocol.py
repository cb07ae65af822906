"""What the trainer and the tasks see of an engine, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stage_trainer.optim.update_norms import UpdateNorms


class Objective(nn.Module):
    """A module for an engine to run: what a task computes from its model.

    Attributes:
        model: what a checkpoint holds. All parameters are its own.
    """

    model: nn.Module


class Movable(Protocol):
    """A part of a batch, on the host."""

    def to(self, device: torch.device) -> object: ...


class Engine(Protocol):
    """An objective and its optimizer, on this rank.

    Attributes:
        objective: what the engine runs.
        device: of the parameters.
        world: number of ranks.
        optimizer: its `param_groups` are those that `make_engine` was given.
        parameters: the trainable ones, by name in the model; under ZeRO 3 partitioned.
        update_norms: of whole parameters; under ZeRO 3 it measures nothing.
        shell: a copy of the model on the meta device, to load a checkpoint's weights into.
    """

    objective: Any  # each task knows the type of its own
    device: torch.device
    world: int
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    update_norms: UpdateNorms
    shell: nn.Module

    def train(self, mode: bool = True) -> None:
        """Switches between training and evaluation, as `nn.Module.train`."""

    def forward(self, part: Movable, **options: Any) -> Any:
        """Moves a part of a batch to the device and returns the objective's output for it, given `options`."""

    def forward_passes(self, own: int) -> int:
        """How many forward passes this rank must run in a step, if its own part of the batch takes `own`: under ZeRO 3
        as many as any rank, because each pass gathers the weights from all ranks."""

    def forward_share(self) -> tuple[int, int]:
        """(i, n): of forward passes outside a step this rank may run the i-th of n shares. Under ZeRO 3 (0, 1), since
        all ranks have to run the same ones."""

    def backwards(self) -> AbstractContextManager[Callable[[Tensor, bool], None]]:
        """Yields `backward(loss, last)`, to be called once or several times for one step; `last` marks the last one.

        Gradients of all calls add up on each rank; on leaving they are averaged over ranks, once.
        """

    def step(self) -> bool:
        """Updates the parameters, unless a gradient is not finite: then everything stays as it is and the gradients are
        dropped. Returns whether it updated, the same on every rank.

        Raises:
            UserError: under ZeRO, a group of which only some parameters have a gradient.
        """

    def diagnosis(self) -> str:
        """Where a gradient of the last skipped step was not finite, as a sentence; "" if that is not known."""

    def gradient_norms(self) -> dict[str, float]:
        """L2 norms of the last step's gradients before clipping: by tower, or under ZeRO over "all"."""

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """The sum, float64 on the device; every rank has to call."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's full value, float32; every rank has to call."""

    def clamp_(self, parameter: nn.Parameter, *, max: float) -> None:
        """Limits a trainable parameter's values from above, in ZeRO's own copy too; every rank has to call."""

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """("parameter name|key", full tensor) of every optimizer state, frozen parameters' included: with this a run
        continues with another world size, ZeRO stage or resolution. Every rank has to iterate.

        Parameters that were never updated have none, as in torch.
        """

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        """Restores what `optimizer_state` gave, for every parameter in `saved`; state of frozen ones is kept for the
        stage that trains them.

        Raises:
            ValueError: parameters of one group made different numbers of steps; groups that are made with `saved` keep
                them apart.
        """

    def copy_of_weights(self) -> dict[str, Tensor]:
        """A copy of the model's state dict in main memory on rank 0, empty elsewhere; every rank has to call."""

    def close(self) -> None:
        """Removes DeepSpeed's hooks and frees its buffers; the engine cannot be used afterwards."""
