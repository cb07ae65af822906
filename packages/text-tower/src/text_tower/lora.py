"""A Linear and an Embedding that carry low-rank adapters (LoRA, arXiv 2106.09685) beside their weight.

`weight` keeps its plain name, so a tower without adapters has exactly the parameters of the published layout. Adapters
are stacked in one tensor pair: adapter k adds `scale · B[k] A[k]` to a Linear's weight and `scale · A[k] B[k]` to a
table; adapter None adds nothing. The product is never formed in a forward pass; for a table of 250,002 rows it would
be as large as the table.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # as XLM-RoBERTa


class AdaptedLinear(nn.Linear):
    """`y = x Wᵀ + b + scale · (x A[k]ᵀ) B[k]ᵀ`; `lora_A` is `[n, rank, in]` and `lora_B` `[n, out, rank]`.

    Args:
        in_features, out_features: as in nn.Linear.
        adapters: n; with 0 this is a plain Linear.
        rank, scale: of the adapters.
    """

    def __init__(self, in_features: int, out_features: int, adapters: int = 0, rank: int = 0, scale: float = 1.0):
        self.scale, self.adapters = scale, adapters
        super().__init__(in_features, out_features)
        if adapters:
            self.lora_A = nn.Parameter(torch.empty(adapters, rank, in_features))
            self.lora_B = nn.Parameter(torch.empty(adapters, out_features, rank))
            self.reset_adapters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def reset_adapters(self) -> None:
        """A uniform (Kaiming), B zero: a fresh adapter changes nothing."""
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, adapter: int | None = 0) -> Tensor:
        y = super().forward(x)
        if not self.adapters or adapter is None:
            return y
        return torch.add(y, F.linear(F.linear(x, self.lora_A[adapter]), self.lora_B[adapter]), alpha=self.scale)

    def merged(self, adapter: int | None) -> Tensor:
        """Weight `[out, in]` with the adapter added."""
        if not self.adapters or adapter is None:
            return self.weight
        return self.weight + self.scale * self.lora_B[adapter] @ self.lora_A[adapter]


class AdaptedEmbedding(nn.Embedding):
    """`W[i] + scale · A[k, i] B[k]`; `lora_A` is `[n, rows, rank]` and `lora_B` `[n, rank, width]`."""

    def __init__(self, rows: int, width: int, adapters: int = 0, rank: int = 0, scale: float = 1.0):
        self.scale, self.adapters = scale, adapters
        super().__init__(rows, width)
        if adapters:
            self.lora_A = nn.Parameter(torch.empty(adapters, rows, rank))
            self.lora_B = nn.Parameter(torch.empty(adapters, rank, width))
            self.reset_adapters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def reset_adapters(self) -> None:
        """A uniform (Kaiming), B zero: a fresh adapter changes nothing."""
        rank = self.lora_A.shape[-1]
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
        nn.init.zeros_(self.lora_B)

    def forward(self, ids: Tensor, adapter: int | None = 0) -> Tensor:
        y = super().forward(ids)
        if not self.adapters or adapter is None:
            return y
        return torch.add(y, F.embedding(ids, self.lora_A[adapter]) @ self.lora_B[adapter], alpha=self.scale)

    def merged(self, adapter: int | None) -> Tensor:
        """Table `[rows, width]` with the adapter added."""
        if not self.adapters or adapter is None:
            return self.weight
        return self.weight + self.scale * self.lora_A[adapter] @ self.lora_B[adapter]


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of a tower belongs to its adapters."""
    return parameter_name.endswith((".lora_A", ".lora_B"))


def add_fresh_adapters(model: nn.Module) -> None:
    """Gives adapters that still are on the meta device memory and their initial values."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear | AdaptedEmbedding) and module.adapters and module.lora_A.is_meta:
            module.lora_A = nn.Parameter(torch.empty_like(module.lora_A, device=module.weight.device))
            module.lora_B = nn.Parameter(torch.empty_like(module.lora_B, device=module.weight.device))
            module.reset_adapters()
