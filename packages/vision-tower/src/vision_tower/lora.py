"""Low-rank adapters (LoRA, arXiv 2106.09685) on the products of the blocks.

`weight` and `bias` keep their plain names, so a tower without an adapter has exactly timm's parameters. It has at most
one, which is always on; `VisionTower.merged` adds it to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tower.config import VisionTowerConfig


class AdaptedLinear(nn.Linear):
    """`y = x (W + scale · B A)ᵀ + b`; A is `[rank, in]` and B `[out, rank]`, applied as two thin products.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        rank, scale: of the adapter.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rank: int, scale: float):
        super().__init__(in_features, out_features, bias)
        self.scale = scale
        # Parameters of the module itself: ZeRO 3 gathers a module's own before its forward.
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """A uniform (Kaiming), B zero: a new adapter changes nothing."""
        if not self.lora_A.is_meta:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.lora_A, -bound, bound)
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(x, self.lora_A), self.lora_B)
        joined = joined_of(self)
        own = F.linear(x, self.weight, self.bias) if joined is None else joined(x)[0]
        return torch.add(own, added, alpha=self.scale)

    def merged(self) -> Tensor:
        """Weight `[out, in]` with the adapter added."""
        return torch.add(self.weight, self.lora_B @ self.lora_A, alpha=self.scale)


Joined = Callable[[Tensor], tuple[Tensor, ...]]


def joined_of(linear: nn.Linear) -> Joined | None:
    """What computes its `x Wᵀ + b` in its place (`VisionTower.joined_linears`)."""
    found: Joined | None = getattr(linear, "joined", None)
    return found


def linear(config: VisionTowerConfig, in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A product of a block, with an adapter if the configuration has one."""
    if not config.lora_rank:
        return nn.Linear(in_features, out_features, bias)
    scale = config.lora_alpha / config.lora_rank
    return AdaptedLinear(in_features, out_features, bias, rank=config.lora_rank, scale=scale)


def is_adapter(name: str) -> bool:
    """Whether a parameter of a tower belongs to its adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def merged_state_dict(tower: nn.Module) -> dict[str, Tensor]:
    """A tower's weights under timm's names, with its adapter added to them; not copies where there is none."""
    with torch.no_grad():
        plain = {name: p.detach() for name, p in tower.named_parameters() if not is_adapter(name)}
        for name, module in tower.named_modules():
            if isinstance(module, AdaptedLinear):
                plain[f"{name}.weight"] = module.merged()
    return plain


def lacks_adapters(tower: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tower has adapters that weights to be loaded into it know nothing of: they stay new."""
    return any(map(is_adapter, tower.state_dict())) and not any(map(is_adapter, weights))


def add_fresh_adapters(tower: nn.Module) -> None:
    """Gives adapters that are still on the meta device memory and initial values."""
    for module in tower.modules():
        if isinstance(module, AdaptedLinear) and module.lora_A.is_meta:
            module.lora_A = nn.Parameter(module.weight.new_empty(module.lora_A.shape))
            module.lora_B = nn.Parameter(module.weight.new_empty(module.lora_B.shape))
            module.reset_adapter()
