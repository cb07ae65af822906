"""Position schemes: the only interface between the tower and how it tells positions.

A scheme is built once for each batch and given to attention; blocks do not see it. It turns queries and keys
(`__call__`), or it biases their scores: then it gives `slopes` to the backends in `text_tower.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from text_tower.config import TextTowerConfig


class Rotary:
    """Rotary positions, the half rotation of llama (RoPE, arXiv 2104.09864).

    Position p turns pair j by the angle p θ^(-2j/d); pair j is channels j and j + d/2 of a head.

    Args:
        positions: int64 `[T]`, each token's position in its sequence.
        head_dim: d.
        theta: θ.
    """

    slopes = None

    def __init__(self, positions: Tensor, head_dim: int, theta: float):
        pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None, None, None].float() * theta ** -(pairs / head_dim)
        self.cos, self.sin = angles.cos(), angles.sin()  # float32 [T, 1, 1, d / 2]
        self.signed = torch.stack([-self.sin, self.sin], dim=-2)  # [T, 1, 1, 2, d / 2]

    def __call__(self, qk: Tensor) -> Tensor:
        """Queries and keys `[T, 2, heads, d]`, turned, in their own dtype."""
        if torch.compiler.is_compiling():
            # One kernel that only reads elsewhere; for two halves that are joined Inductor's takes ten times as long.
            halves = torch.unflatten(qk, -1, (2, -1))
            turned = halves * self.cos.unsqueeze(-2) + halves.flip(-2) * self.signed
            return turned.flatten(-2).to(qk.dtype)
        a, b = qk.chunk(2, dim=-1)
        # One pass over the tokens less than a * cos - b * sin.
        both = torch.addcmul(a * self.cos, b, self.sin, value=-1), torch.addcmul(b * self.cos, a, self.sin)
        return torch.cat(both, dim=-1).to(qk.dtype)


class ALiBi:
    """Attention with linear biases (arXiv 2108.12409), in its symmetric form for encoders (arXiv 2310.19923).

    A score between positions i and j of a sequence gets −slope · |i − j| added before the softmax.

    Args:
        heads: each has a slope of its own.
        device: of `slopes`, float32 `[heads]`.
    """

    def __init__(self, heads: int, device: torch.device):
        # A power of two has the slopes 2^(-8/n), 2^(-16/n), …; another number those of the power below it and then
        # every second one of the power above it.
        n = 1 << (heads.bit_length() - 1)
        exponents = [8 / n * (i + 1) for i in range(n)] + [4 / n * (2 * i + 1) for i in range(heads - n)]
        self.slopes = torch.tensor([2.0**-x for x in exponents], device=device, dtype=torch.float32)

    def __call__(self, qk: Tensor) -> Tensor:
        """Queries and keys, as they are."""
        return qk


Positions = Rotary | ALiBi


def scheme(config: TextTowerConfig, positions: Tensor) -> Positions:
    """The configuration's scheme for tokens at `positions`, int64 `[T]`, in their sequences."""
    if config.positions == "alibi":
        return ALiBi(config.heads, positions.device)
    return Rotary(positions, config.head_dim, config.rope_theta)
