"""Parameter groups, the optimizer and the learning-rate schedule of a stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from text_tower import MaskedLM
from text_tower.lora import is_adapter
from torch import Tensor, nn

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.muon import Muon
from stage_trainer.recipe import OptimizerConfig, Stage


def parameter_groups(
    model: DualEncoder | MaskedLM, stage: Stage, config: OptimizerConfig, steps: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups of trainable parameters that share a peak rate, weight decay, kind of update and count of steps.

    ZeRO makes one tensor of a group, with one count of Adam's steps. So what may rest while others move (a tower, a
    temperature, an adapter) has groups of its own, and so have parameters of which other `steps` were made before
    ({name: how many}; 0 for those that it does not name).

    A parameter at depth i of a tower with L layers trains at `lr · layer_decay ** (L - i)`: per layer, from the top, by
    the tower's own account of its layers. No weight decay on vectors (biases, norms, temperatures) nor on the class
    token and position table, as in open_clip and EVA-CLIP.
    """
    towers: dict[str, tuple[str, Any]] = {"text": ("", model)}
    if isinstance(model, DualEncoder):
        towers = {"image": ("vision.", model.vision), "text": ("text.", model.text)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(name: str, parameter: nn.Parameter, lr: float, decay: float, muon: bool, tower: str, part: str) -> None:
        if not parameter.requires_grad:
            return
        group = groups.setdefault(
            (tower, part, lr, decay, muon, (steps or {}).get(name, 0.0)),
            {"params": [], "names": [], "lr": lr, "peak_lr": lr, "weight_decay": decay, "muon": muon, "tower": tower},
        )
        group["params"].append(parameter)
        group["names"].append(name)

    for tower, (prefix, module) in towers.items():
        # A rate that is left out is one at which nothing trains (recipe.stage_rules sees to it).
        base, layer_decay = getattr(stage.lr, tower) or 0.0, getattr(stage.layer_decay, tower)
        layers = module.layer_ids()
        for name, parameter in module.named_parameters():
            lr = base * layer_decay ** (module.num_layers - layers[name])
            in_block = "embeddings" not in name and not name.startswith("lm_head.")
            muon = config.name == "muon" and parameter.ndim == 2 and in_block and not is_adapter(name)
            if muon:
                lr *= config.muon_lr_scale
            elif "embeddings" in name:
                lr *= config.embedding_lr_scale
            plain = parameter.ndim < 2 or name.endswith(("cls_token", "pos_embed"))
            adapter = name.partition(".lora_")[2][1:]  # `lora_A.KEY` and `lora_B.KEY` belong together
            add(f"{prefix}{name}", parameter, lr, 0.0 if plain else config.weight_decay, muon, tower, adapter)
    if isinstance(model, DualEncoder):
        for name, tower in (("logit_scale", "image"), ("text_logit_scale", "text")):
            add(name, getattr(model, name), getattr(stage.lr, tower) or 0.0, 0.0, False, tower, name)
    for group in groups.values():
        # A unified loss has one temperature for both tasks, which never waits for images.
        group["waits"] = not (stage.loss.kind == "unified" and group["names"] == ["logit_scale"])
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, precision: str) -> torch.optim.Optimizer:
    """AdamW over all groups, or Muon over those marked for it and AdamW over the rest; Muon computes in `precision`."""
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    if config.name == "adamw":
        return let_rest(torch.optim.AdamW(groups, **options))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    muon = {
        "momentum": config.muon_momentum,
        "dtype": dtype,
        "group": torch.distributed.group.WORLD if several else None,
    }
    return let_rest(MuonWithAdamW(groups, muon, options))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and torch's AdamW behind one optimizer's face, as DeepSpeed takes a single one."""

    def __init__(self, groups: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]):
        matrices = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, **muon))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # One set of group dictionaries: a rate that is set here is the one that the parts read.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def part_of(self, group: dict[str, Any]) -> torch.optim.Optimizer:
        """The optimizer that holds the state of a group's parameters."""
        return next(part for part in self._parts if any(g is group for g in part.param_groups))


def schedule(step: int, steps: int, warmup: int, min_ratio: float = 0.0) -> float:
    """The share of the peak rate at `step`: linear warm-up, then cosine to `min_ratio` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def let_rest(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, which from now on passes over the groups that rest (`group["rests"]`): no step is counted for
    them, their moments stay, and so do they, whatever their gradients are. ZeRO gives zeros to what has no gradient,
    for which Adam would count a step and let its moments decay."""
    held: list[tuple[Tensor, Tensor | None]] = []

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["rests"] else ():
                held.append((parameter, parameter.grad))
                parameter.grad = None

    def after(*_: Any) -> None:
        for parameter, gradient in held:
            parameter.grad = gradient
        held.clear()

    for group in optimizer.param_groups:
        group["rests"] = False
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, factor: float, towers: Collection[str]) -> None:
    """Each group's rate at a step, `factor` of its peak. A tower that is not among `towers` has no part in the step and
    rests (`let_rest`)."""
    if any("rests" not in group for group in optimizer.param_groups):
        let_rest(optimizer)
    for group in optimizer.param_groups:
        group["rests"] = group["tower"] not in towers and group.get("waits", True)
        group["lr"] = 0.0 if group["rests"] else group["peak_lr"] * factor


def named_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """(name, parameter, the optimizer's state of it) for every parameter of a plain (not partitioned) optimizer."""
    for group in optimizer.param_groups:
        holder = optimizer.part_of(group) if isinstance(optimizer, MuonWithAdamW) else optimizer
        for name, parameter in zip(group["names"], group["params"], strict=True):
            yield name, parameter, holder.state[parameter]
