"""DeepSpeed around the objective, and the optimizer's state by parameter name, whatever the ZeRO stage.

State by name is what lets a run go on with another world size, another ZeRO stage or another resolution.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from text_tower.masked_lm import MaskedLoss
from torch import Tensor, nn

from stage_trainer.batch import Embedded, MaskedBatch, Part
from stage_trainer.build import Model
from stage_trainer.errors import UserError
from stage_trainer.masked_lm import HiddenWords
from stage_trainer.movement import Movement
from stage_trainer.objective import MultiTask
from stage_trainer.optim import build_optimizer, named_states, parameter_groups
from stage_trainer.recipe import Recipe, Stage


class Engine:
    """A stage's objective and optimizer under DeepSpeed.

    Args:
        objective: with its weights loaded.
        recipe, stage: precision and optimizer; rates, freezing and DeepSpeed's own options.
        saved: the optimizer's state to go on with, as `optimizer_state` gave it.
    """

    def __init__(
        self,
        objective: MultiTask | HiddenWords,
        recipe: Recipe,
        stage: Stage,
        saved: dict[str, Tensor] | None = None,
    ):
        import deepspeed

        objective.set_trainable(stage)
        # A model without weights, for those of a checkpoint; made before DeepSpeed hangs its hooks on the modules.
        self.shell = _without_weights(objective.model)
        steps = {name.removesuffix("|step"): float(v) for name, v in (saved or {}).items() if name.endswith("|step")}
        self.optimizer = build_optimizer(
            parameter_groups(objective.model, stage, recipe.optimizer, steps), recipe.optimizer, recipe.precision
        )
        self.parameters = {
            n: p for g in self.optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)
        }
        self.config = deepspeed_config(recipe, stage)
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=self.optimizer, config=self.config)
        self.objective: Any = objective
        self.world = torch.distributed.get_world_size()
        self._norms: dict[str, float] = {}
        self._lost: list[str] = []
        self._highest_scale = -math.log(stage.loss.min_temperature)
        self.zero = self.engine.zero_optimization_stage()
        self._without_gradient: set[str] = set()
        # Gradients are averaged in `backwards`, once it is known which parameters have none.
        self.engine.enable_backward_allreduce = False
        if self.zero:
            self._create_partitioned_state()
        # A tower that is frozen for a stage finds its moments again when it trains in the next.
        frozen = {name for name, p in objective.model.named_parameters() if not p.requires_grad}
        self._of_frozen = {key: v for key, v in (saved or {}).items() if key.rpartition("|")[0] in frozen}
        if saved:
            self.load_optimizer_state(saved)
        towers: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups if self.zero < 3 else ():  # ZeRO 3 cuts parameters up
            towers.setdefault(group["tower"], []).extend(self.parameters[name] for name in group["names"])
        self.movement = Movement(towers)

    def embed(self, part: Part, patch_dropout: float) -> Embedded:
        return self.engine(part.to(self.engine.device), patch_dropout=patch_dropout)

    def predict(self, batch: MaskedBatch) -> MaskedLoss:
        """The loss of a batch of masked texts, or of a part of it."""
        return self.engine(batch.to(self.engine.device))

    def forward_passes(self, mine: int) -> int:
        """As many on every rank under ZeRO 3, where each pass gathers the weights from all ranks."""
        if self.zero < 3:
            return mine
        most = torch.tensor(mine, device=self.engine.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """float64, on the engine's device; every rank has to call."""
        total = numbers.to(self.engine.device, torch.float64, copy=True)
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return total

    @contextlib.contextmanager
    def backwards(self) -> Iterator[Callable[[Tensor, bool], None]]:
        """Yields `backward(loss, last)`, to be called once or several times for one step; `last` marks the last one.

        Gradients add up on each rank and are reduced over ranks once: DeepSpeed would otherwise reduce after each
        backward pass, and ZeRO 1 and 2 would keep the last one's alone.
        """

        def backward(loss: Tensor, last: bool) -> None:
            if not self.zero:
                self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss)

        with self.engine.coalesce_grad_reduction() if self.zero else contextlib.nullcontext():
            yield backward
            self._without_gradient = self._find_without_gradient()  # before DeepSpeed gives them zeros
        if not self.zero:
            self.engine.set_gradient_accumulation_boundary(True)  # the last pass may be one that nothing learns from
            if self.world > 1:
                self.engine.allreduce_gradients()
                for name in self._without_gradient:
                    self.parameters[name].grad = None

    def _find_without_gradient(self) -> set[str]:
        """The parameters that no rank has a gradient for: they had no part in the step, and are not to move."""
        found = torch.tensor([p.grad is not None for p in self.parameters.values()], dtype=torch.uint8)
        if self.world > 1:
            found = found.to(self.engine.device)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return {name for name, there in zip(self.parameters, found.tolist(), strict=True) if not there}

    def step(self) -> bool:
        """Updates the parameters, unless a gradient is not finite: then all stays as it is but for the gradients, which
        are dropped. Returns whether it updated; every rank finds the same."""
        if self.zero:
            with self._groups_at_rest():
                self.engine.step()
            applied = not self.engine.optimizer.overflow
        else:
            self._norms = self._gradient_norms()
            applied = all(math.isfinite(norm) for norm in self._norms.values())
            if applied:
                self.engine.step()
            else:
                grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
                self._lost = [name for name, grad in grads.items() if not grad.isfinite().all()]
                self.engine.zero_grad()
        self._keep_scales_down()
        return applied

    @contextlib.contextmanager
    def _groups_at_rest(self) -> Iterator[None]:
        """Lets the groups rest whose parameters have no gradient; those of a group are one to ZeRO."""
        resting = []
        for group in self.optimizer.param_groups:
            without = [name for name in group["names"] if name in self._without_gradient]
            if len(without) == len(group["names"]) and not group["rests"]:
                resting.append(group)
            elif 0 < len(without) < len(group["names"]):
                others = [name for name in group["names"] if name not in self._without_gradient]
                raise UserError(
                    f"{without[0]} has no part in this step and {others[0]} has, but ZeRO moves both as one; expected "
                    "all parameters of a group to take part together. Set zero_optimization.stage to 0, or freeze "
                    "what does not take part"
                )
        for group in resting:
            group["rests"] = True
        yield
        for group in resting:
            group["rests"] = False

    def diagnosis(self) -> str:
        """Where the gradient of a step that was not applied was not finite, if that is known (ZeRO drops it unseen)."""
        if not self._lost:
            return ""
        return f"That holds for {len(self._lost)} of {len(self.parameters)} parameters, the first {self._lost[0]}."

    def _keep_scales_down(self) -> None:
        """The temperatures' floor is a ceiling for their logarithms; what does not train stays as it is."""
        import deepspeed

        ceiling = self._highest_scale
        for parameter in self.objective.logit_scales.values():
            if not parameter.requires_grad or (scale := self._whole(parameter)) <= ceiling:
                continue
            if self.zero:  # it updates from a copy of its own, which would run away behind the floor
                self._set_partitioned(parameter, torch.full_like(scale, ceiling))
            whole = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero == 3)
            with whole, torch.no_grad():
                parameter.clamp_(max=ceiling)

    def temperatures(self) -> dict[str, float]:
        """Of each task; under ZeRO every rank has to ask."""
        return {task: math.exp(-self._whole(scale).item()) for task, scale in self.objective.logit_scales.items()}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's value; under ZeRO every rank has to ask."""
        if not self.zero:
            return parameter.detach()
        if not parameter.requires_grad:  # ZeRO keeps no copy of what does not train, but ZeRO 3 cuts it up
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero == 3):
                return parameter.detach().clone()
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def _gradient_norms(self) -> dict[str, float]:
        """L2 norms before clipping, by tower, where whole gradients are at hand."""
        groups: dict[str, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            groups.setdefault(group["tower"], []).extend(p.grad for p in group["params"] if p.grad is not None)
        return {tower: float(nn.utils.get_total_norm(grads)) for tower, grads in groups.items() if grads}

    def gradient_norms(self) -> dict[str, float]:
        """L2 norms of the last step's gradients before clipping: by tower, or under ZeRO over "all"."""
        if not self.zero:
            return self._norms
        norm = self.engine.get_global_grad_norm()
        return {} if norm is None else {"all": float(norm)}

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """("parameter name|key", full tensor) of every optimizer state; every rank takes part, in the same order.

        Parameters that never moved have none, as in torch."""
        yield from self._of_frozen.items()
        if not self.zero:
            for name, _, state in named_states(self.optimizer):
                for key, value in state.items():
                    yield f"{name}|{key}", value if torch.is_tensor(value) else torch.tensor(float(value))
            return
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = {name: state["step"] for names, state in self._partitioned_states() for name in names}
        for name, parameter in self.parameters.items():
            if steps[name]:
                for key in ("exp_avg", "exp_avg_sq"):
                    yield f"{name}|{key}", safe_get_full_optimizer_state(parameter, key)
                yield f"{name}|step", steps[name]

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        """Puts back what `optimizer_state` gave, for every parameter that `saved` knows.

        Raises:
            ValueError: parameters that ZeRO holds as one were moved in different numbers of steps; an engine that is
                made with `saved` keeps them apart.
        """
        if not self.zero:
            for name, parameter, state in named_states(self.optimizer):
                for full, value in saved.items():
                    owner, _, key = full.rpartition("|")
                    if owner == name:
                        state[key] = value.to(parameter.device).clone()
            return
        for names, state in self._partitioned_states():
            steps = {float(saved.get(f"{name}|step", 0.0)) for name in names}
            if len(steps) > 1:
                raise ValueError(f"{names[0]} and others of its group were moved in {sorted(steps)} steps")
            state["step"].fill_(steps.pop())
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{name}|{key}" in saved:
                    self._set_partitioned(parameter, saved[f"{name}|{key}"].to(self.engine.device), key)

    def _set_partitioned(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Sets ZeRO's copy of a parameter, or the optimizer state `key` of it, from the whole value."""
        from deepspeed import utils

        if self.zero < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # Each rank sets its own part: DeepSpeed's way with whole values fails where a size is no multiple of the ranks.
        world, rank, part = (
            torch.distributed.get_world_size(),
            torch.distributed.get_rank(),
            parameter.ds_tensor.numel(),
        )
        padded = nn.functional.pad(value.flatten(), (0, part * world - value.numel()))
        mine = padded[part * rank : part * (rank + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, mine)
        else:
            utils.safe_set_local_optimizer_state(parameter, mine, key)

    def _partitions(self) -> Iterator[tuple[list[nn.Parameter], Tensor]]:
        """(parameters, this rank's part of them in one tensor) as ZeRO's inner optimizer steps them."""
        zero = self.engine.optimizer
        if self.zero < 3:
            yield from zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        else:
            yield from zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)

    def _partitioned_states(self) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """(names of the parameters, AdamW's state of them) for every tensor that ZeRO steps."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameters, partition in self._partitions():
            yield [names[id(p)] for p in parameters], self.engine.optimizer.optimizer.state[partition]

    def _create_partitioned_state(self) -> None:
        """AdamW's state before its first step, which would make it: a parameter that had no gradient then, or whose
        state is to be loaded, would otherwise be without."""
        for _, partition in self._partitions():
            self.engine.optimizer.optimizer.state[partition] = {
                "step": torch.zeros((), device=partition.device),  # fused AdamW wants it there
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        if self.zero < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def copy_of_weights(self) -> dict[str, Tensor]:
        """The model's state as it is now, in main memory, on rank 0; nothing on other ranks, which have to call too."""
        import deepspeed

        # ZeRO 3 cuts parameters up; in here they are whole on every rank.
        with deepspeed.zero.GatheredParameters(list(self.objective.parameters()), enabled=self.zero == 3):
            state = self.objective.model.state_dict() if torch.distributed.get_rank() == 0 else {}
            return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _without_weights(model: Model) -> Model:
    """A copy whose parameters and buffers are on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    meta = {id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
            for t in tensors}  # fmt: skip
    return copy.deepcopy(model, meta)


def deepspeed_config(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """DeepSpeed's configuration: what this trainer needs, and the recipe's own options (`recipe.deepspeed`)."""
    return {
        "steps_per_print": 10**9,
        **stage.deepspeed,
        # Batches are made by the sampler; DeepSpeed only wants these numbers to agree with one another.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's default clips at 1.0 unasked.
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "zero_allow_untested_optimizer": True,
    }
