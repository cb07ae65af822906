"""Parameter groups: who shares a peak rate, a weight decay and a kind of update, and who rests while others train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from text_tower import MaskedLM, TextTower
from text_tower.lora import is_adapter
from torch import Tensor, nn
from vision_tower import VisionTower

from stage_trainer.recipe import OptimizerConfig

Tower = TextTower | VisionTower | MaskedLM
ParamGroup = dict[str, Any]
"""A group of torch's. Beside torch's keys: `names` of its `params`, their `tower`, `peak_lr`, whether `muon` updates
them, whether the group `rests` in this step (`let_rest`), and whether it rests when its tower does (`waits`)."""


class ParameterGroups:
    """Collects a model's trainable parameters; iterates over the groups.

    ZeRO makes one tensor of a group, with one count of Adam's steps. So parameters that may rest while others train (a
    tower, a temperature, an adapter) have groups of their own, and so have those that made a different number of steps
    before.

    Args:
        config: weight decay, kind of update, and the scales of Muon's and the embeddings' rates.
        saved: the optimizer state to continue with, as an engine's `optimizer_state` gave it.
    """

    def __init__(self, config: OptimizerConfig, saved: Mapping[str, Tensor] | None = None):
        self.config = config
        self._steps = {n.removesuffix("|step"): float(v) for n, v in (saved or {}).items() if n.endswith("|step")}
        self._groups: dict[tuple[Any, ...], ParamGroup] = {}

    def add_tower(self, name: str, tower: Tower, *, prefix: str, lr: float | None, layer_decay: float) -> None:
        """Adds a tower's parameters; one at depth i of L layers trains at `lr · layer_decay ** (L - i)`.

        No weight decay on vectors (biases, norms) nor on the class token and position table, as in open_clip and
        EVA-CLIP.

        Args:
            name: "image" or "text".
            prefix: of the parameters' names in the model.
            lr: peak rate; None where nothing trains (`recipe.stage_rules` makes sure).
        """
        layers = tower.layer_ids()
        for own_name, parameter in tower.named_parameters():
            rate = (lr or 0.0) * layer_decay ** (tower.num_layers - layers[own_name])
            muon = self.config.name == "muon" and is_muon_matrix(own_name, parameter)
            if muon:
                rate *= self.config.muon_lr_scale
            elif "embeddings" in own_name:
                rate *= self.config.embedding_lr_scale
            no_decay = parameter.ndim < 2 or own_name.endswith(("cls_token", "pos_embed"))
            self._add(
                f"{prefix}{own_name}",
                parameter,
                own_name.partition(".lora_")[2][1:],  # `lora_A.KEY` and `lora_B.KEY` train together
                tower=name,
                lr=rate,
                weight_decay=0.0 if no_decay else self.config.weight_decay,
                muon=muon,
            )

    def add_scalar(
        self, name: str, parameter: nn.Parameter, *, tower: str, lr: float | None, waits: bool = True
    ) -> None:
        """Adds a temperature or bias, which trains at the rate of `tower` and, if it `waits`, rests when that does."""
        self._add(name, parameter, name, tower=tower, lr=lr or 0.0, weight_decay=0.0, muon=False, waits=waits)

    def _add(self, name: str, parameter: nn.Parameter, part: str, *, waits: bool = True, **settings: Any) -> None:
        if not parameter.requires_grad:
            return
        key = (part, self._steps.get(name, 0.0), waits, *settings.values())
        new = {"params": [], "names": [], "peak_lr": settings["lr"], "waits": waits, **settings}
        group = self._groups.setdefault(key, new)
        group["params"].append(parameter)
        group["names"].append(name)

    def __iter__(self) -> Iterator[ParamGroup]:
        yield from self._groups.values()


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon, where a recipe asks for it, updates a parameter: weight matrices of the blocks, no adapters, no
    projector."""
    in_block = not any(word in name for word in ("embeddings", "projector.")) and not name.startswith("lm_head.")
    return parameter.ndim == 2 and in_block and not is_adapter(name)


def let_rest(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, which from now on skips groups that rest (`group["rests"]`): their parameters and moments stay as
    they are and no step is counted, whatever their gradients are. ZeRO gives zeros to what has no gradient, for which
    Adam would count a step and let its moments decay."""
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


def named_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """(name, parameter, the optimizer's state of it) for every parameter of an optimizer that is not partitioned."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            yield name, parameter, optimizer.state[parameter]
