"""The engines under ZeRO: ranks share the optimizer state (1), the gradients too (2), the parameters too (3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from stage_trainer.engine import deepspeed_private
from stage_trainer.engine.base import Engine
from stage_trainer.errors import UserError
from stage_trainer.optim.update_norms import UpdateNorms

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state, beside its count of steps."""


class PartitionedEngine(Engine):
    """ZeRO 1 and 2, with AdamW."""

    def _prepare(self) -> None:
        self._unused: set[str] = set()
        # AdamW's first step would make its state; parameters without a gradient in it, or with a state to load, would
        # have none.
        for _, partition in self._partitions():
            self.optimizer.state[partition] = {
                "step": torch.zeros((), device=partition.device),  # fused AdamW needs it there
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
        deepspeed_private.link_states(self._engine)

    @contextmanager
    def backwards(self) -> Iterator[Callable[[Tensor, bool], None]]:
        # Outside of this context DeepSpeed would reduce after each backward, and keep the last one's gradients alone.
        with deepspeed_private.one_reduction(self._engine):
            yield lambda loss, last: self._engine.backward(loss)
            self._unused = self._without_gradient()  # before DeepSpeed gives them zeros

    def step(self) -> bool:
        with self._groups_at_rest():
            self._engine.step()
        return not deepspeed_private.found_overflow(self._engine)

    @contextmanager
    def _groups_at_rest(self) -> Iterator[None]:
        """Lets groups rest whose parameters have no gradient; ZeRO updates the parameters of a group as one tensor."""
        resting = []
        for group in self.optimizer.param_groups:
            without = [name for name in group["names"] if name in self._unused]
            if len(without) == len(group["names"]) and not group["rests"]:
                resting.append(group)
            elif 0 < len(without) < len(group["names"]):
                others = [name for name in group["names"] if name not in self._unused]
                raise UserError(
                    f"{without[0]} has no gradient in this step and {others[0]} has, but ZeRO updates both as one; "
                    "expected all parameters of a group to take part together. Set zero_optimization.stage to 0, or "
                    "freeze what does not take part"
                )
        for group in resting:
            group["rests"] = True
        yield
        for group in resting:
            group["rests"] = False

    def gradient_norms(self) -> dict[str, float]:
        norm = deepspeed_private.gradient_norm(self._engine)
        return {} if norm is None else {"all": norm}

    def whole(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            value: Tensor = safe_get_full_fp32_param(parameter)
            return value
        with self._gathered([parameter]):  # ZeRO has no copy of what does not train
            return parameter.detach().clone()

    def clamp_(self, parameter: nn.Parameter, *, max: float) -> None:
        value = self.whole(parameter)
        if (value > max).any():
            self._set(parameter, value.clamp(max=max))
            with self._gathered([parameter], modifier_rank=0), torch.no_grad():
                parameter.clamp_(max=max)

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = {name: self.optimizer.state[part]["step"] for names, part in self._partitions() for name in names}
        for name, parameter in self.parameters.items():
            if steps[name]:
                for key in MOMENTS:
                    yield f"{name}|{key}", safe_get_full_optimizer_state(parameter, key)
                yield f"{name}|step", steps[name]

    def _load_states(self, saved: dict[str, Tensor]) -> None:
        for names, partition in self._partitions():
            steps = {float(saved.get(f"{name}|step", 0.0)) for name in names}
            if len(steps) > 1:
                raise ValueError(f"{names[0]} and others of its group were moved in {sorted(steps)} steps")
            self.optimizer.state[partition]["step"].fill_(steps.pop())
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                if f"{name}|{key}" in saved:
                    self._set(parameter, saved[f"{name}|{key}"].to(self.device), key)

    def _partitions(self) -> Iterator[tuple[list[str], Tensor]]:
        """(names of parameters, this rank's part of them in one tensor), for each tensor that AdamW updates."""
        for group in self.optimizer.param_groups:
            (partition,) = group["params"]  # ZeRO put it there
            yield group["names"], partition

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Sets ZeRO's copy of a parameter, or its optimizer state `key`, from the full value."""
        from deepspeed import utils

        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)


class Zero3Engine(PartitionedEngine):
    """ZeRO 3: a parameter is whole only while a module uses it, so all ranks have to make the same forward passes."""

    def _prepare(self) -> None:
        super()._prepare()
        self.update_norms = UpdateNorms({})

    def cast_once(self) -> AbstractContextManager[object]:
        return nullcontext()

    def forward_passes(self, own: int) -> int:
        most = torch.tensor(own, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def forward_share(self) -> tuple[int, int]:
        return 0, 1

    def _gathered(
        self, parameters: Iterable[nn.Parameter], modifier_rank: int | None = None
    ) -> AbstractContextManager[object]:
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank)
        return gathered

    def _partitions(self) -> Iterator[tuple[list[str], Tensor]]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameters, partition in deepspeed_private.zero_3_partitions(self._engine):
            yield [names[id(p)] for p in parameters], partition

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        from deepspeed import utils

        # Each rank sets its own part: DeepSpeed's way with full values fails where a size is no multiple of the ranks.
        own, rank = deepspeed_private.own_size(parameter), torch.distributed.get_rank()
        padded = nn.functional.pad(value.flatten(), (0, own * self.world - value.numel()))
        part = padded[own * rank : own * (rank + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)
