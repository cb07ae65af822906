"""Attention over a packed batch whose sequences lie sorted by length (`ByLength`): one function, `attend`.

Sequences of one length form a plain `[n, heads, L, d]` block, so attention is exact with one call per distinct length,
no padding and no mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from text_tower.packed import ByLength


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of each token's angles, float32 `[2, T, 1, 1, head_dim / 2]`.

    Position p turns pair j by p θ^(-2j/d); pair j is channels j and j + d/2 of a head: the half rotation of llama
    (RoPE, arXiv 2104.09864).
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, None, None].float() * theta ** -(pairs / head_dim)
    return torch.stack([angles.cos(), angles.sin()])


def attend(qkv: Tensor, table: Tensor, layout: ByLength) -> Tensor:
    """Rotary self-attention within each sequence.

    Args:
        qkv: `[T, 3, heads, d]`, tokens in the order of `layout`.
        table: from `rotary_table`, for the same tokens.
        layout: the batch's groups.

    Returns:
        `[T, heads, d]` in the dtype of `qkv`.
    """
    dtype = qkv.dtype
    with torch.autocast(qkv.device.type, enabled=False):
        if qkv.device.type == "cpu" and dtype == torch.bfloat16:
            # At every length measured (5 to 256 tokens) a CPU's bfloat16 attention lost to float32 on the same numbers.
            qkv = qkv.float()
        a, b = qkv[:, :2].chunk(2, dim=-1)
        cos, sin = table
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)
        out = []
        for qk, v in zip(layout.blocks(rotated), layout.blocks(qkv[:, 2]), strict=True):
            q, k = qk.permute(2, 0, 3, 1, 4)
            out.append(F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(0, 1))
        return torch.cat(out).to(dtype)
