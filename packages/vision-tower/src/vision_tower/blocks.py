"""EVA02's transformer block: pre-norm, rotary attention and SwiGLU, each with a LayerNorm before its last product.

Parameter names are those of timm's `eva02_*` models, and so is SwiGLU itself. Attention is ours, for speed:

- the class token has a row in the rotary table (a rotation by zero), so nothing is cut off and put together again;
- a rotation is one complex product (rotary.py);
- short sequences on a CPU take two plain matrix products instead of a fused kernel (`attend`);
- the last block computes the class token alone, the only one that is read after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import Tensor, nn

from .config import VisionTowerConfig
from .rotary import rotate

# Up to here plain products in 16 bits beat PyTorch's fused CPU kernel, forward and backward: at 37 tokens a whole
# training step takes half the time, at 577 attention alone 0.5 to 0.8 of it, at 1297 more. (One thread, AVX512-bf16.
# In float32 the two are equal, and the fused kernel needs less memory.)
PLAIN_ATTENTION_TOKENS = 512


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for `q [N, H, S, D]`, `k` and `v [N, H, T, D]`; returns `[N, H, S, D]`."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and k.shape[2] <= PLAIN_ATTENTION_TOKENS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention with rotary positions; queries and values have a bias, keys have none (it would cancel)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.attention_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Tensor, class_only: bool = False) -> Tensor:
        """`x [N, T, width]` and `rotary [N or 1, T, 1, head_dim / 2]` to `[N, T, width]`; with `class_only` to
        `[N, 1, width]`, the class token's row of the same."""
        heads = (self.heads, -1)
        q = self.q_proj(x[:, :1] if class_only else x).unflatten(-1, heads)
        k = rotate(self.k_proj(x).unflatten(-1, heads), rotary)
        v = self.v_proj(x).unflatten(-1, heads)
        if not class_only:  # the class token is turned by zero
            q = rotate(q, rotary)
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(self.norm(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + SwiGLU(LN(x))."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        eps = config.layer_norm_eps
        self.norm1 = nn.LayerNorm(config.width, eps=eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=eps)
        norm: Any = partial(nn.LayerNorm, eps=eps)
        self.mlp = SwiGLU(config.width, config.mlp_hidden, norm_layer=norm)

    def forward(self, x: Tensor, rotary: Tensor, class_only: bool = False) -> Tensor:
        """`x [N, T, width]` to the same, or with `class_only` to `[N, 1, width]`: the class token's row of the same."""
        attended = self.attn(self.norm1(x), rotary, class_only)
        x = (x[:, :1] if class_only else x) + attended
        return x + self.mlp(self.norm2(x))


def initialize(blocks: Iterable[Any]) -> None:
    """EVA's start: weights from a normal distribution of std 0.02, biases 0, and what writes to the residual stream
    divided by sqrt(2 * depth of its block)."""
    for depth, block in enumerate(blocks, start=1):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            block.attn.proj.weight.div_((2.0 * depth) ** 0.5)
            block.mlp.fc2.weight.div_((2.0 * depth) ** 0.5)
