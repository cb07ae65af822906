"""Parameter groups, the optimizer and the learning-rate schedule of a stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from text_tower import MaskedLM
from text_tower.lora import is_adapter
from torch import nn

from stage_trainer.model import DualEncoder
from stage_trainer.muon import Muon
from stage_trainer.recipe import Optimizer as OptimizerConfig
from stage_trainer.recipe import Stage


def parameter_groups(model: DualEncoder | MaskedLM, stage: Stage, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of trainable parameters that share a peak rate, weight decay and kind of update.

    A parameter at depth i of a tower with L layers trains at `lr · layer_decay ** (L - i)`: per layer, from the top, by
    the tower's own account of its layers. No weight decay on vectors (biases, norms, temperatures) nor on the class
    token and position table, as in open_clip and EVA-CLIP.
    """
    towers: dict[str, tuple[str, Any]] = {"text": ("", model)}
    if isinstance(model, DualEncoder):
        towers = {"image": ("vision.", model.vision), "text": ("text.", model.text)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(name: str, parameter: nn.Parameter, lr: float, decay: float, muon: bool, tower: str) -> None:
        if not parameter.requires_grad:
            return
        group = groups.setdefault(
            (tower, lr, decay, muon),
            {"params": [], "names": [], "lr": lr, "peak_lr": lr, "weight_decay": decay, "muon": muon, "tower": tower},
        )
        group["params"].append(parameter)
        group["names"].append(name)

    for tower, (prefix, module) in towers.items():
        base, layer_decay = getattr(stage.lr, tower), getattr(stage.layer_decay, tower)
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
            add(f"{prefix}{name}", parameter, lr, 0.0 if plain else config.weight_decay, muon, tower)
    if isinstance(model, DualEncoder):
        add("logit_scale", model.logit_scale, stage.lr.image, 0.0, False, "image")
        add("text_logit_scale", model.text_logit_scale, stage.lr.text, 0.0, False, "text")
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, precision: str) -> torch.optim.Optimizer:
    """AdamW over all groups, or Muon over those marked for it and AdamW over the rest; Muon computes in `precision`."""
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    muon = {
        "momentum": config.muon_momentum,
        "dtype": dtype,
        "group": torch.distributed.group.WORLD if several else None,
    }
    return MuonWithAdamW(groups, muon, options)


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


def set_rates(optimizer: torch.optim.Optimizer, factor: float, towers: Collection[str]) -> None:
    """Each group's rate at a step, `factor` of its peak. A tower that is not among `towers` has no part in the step: it
    gets zeros for gradients, and at a rate of 0 weight decay leaves it as it is."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor if group["tower"] in towers else 0.0


def named_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """(name, parameter, the optimizer's state of it) for every parameter of a plain (not partitioned) optimizer."""
    for group in optimizer.param_groups:
        holder = optimizer.part_of(group) if isinstance(optimizer, MuonWithAdamW) else optimizer
        for name, parameter in zip(group["names"], group["params"], strict=True):
            yield name, parameter, holder.state[parameter]
