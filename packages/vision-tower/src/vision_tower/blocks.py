"""EVA02's transformer block: pre-norm, rotary attention and SwiGLU, each with a LayerNorm before its last product.

Parameter names are those of timm's `eva02_*` models. What differs is for speed and memory (`benchmarks/cpu.py` and
`benchmarks/memory.py` measure the whole):

- the class token has a row in the rotary table (a rotation by zero), so nothing is cut off and put together again, and
  the rotation is one complex product (rotary.py);
- short sequences in 16 bits on a CPU take two plain matrix products instead of a fused kernel (attention.py);
- the last block computes the class token alone, the only one that is read after it (B/16: 5 % of a step on a CPU);
- under autocast the normalised tokens are cast once, not once for each product that reads them;
- SwiGLU's gate keeps only its inputs for the backward pass, a tensor of the hidden size less in every layer.

Tried on a CPU and left out, because the whole step took the same time: the residual stream, and LayerNorm's gradient to
it, added in place; one product for queries, keys and values (186.0 and 185.4 ms for 1576 tokens of 768, and a parent
that reaches for its children's weights finds nothing there under ZeRO-3, which gathers a module's weights when the
module is called).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention import Attend, Layout, attend
from .config import VisionTowerConfig
from .rotary import rotate


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

    def forward(
        self, x: Tensor, rotary: Tensor, backend: str | Attend, layout: Layout | None = None, class_only: bool = False
    ) -> Tensor:
        """See `Block.forward`; returns what is to be added to the tokens."""
        heads = (self.heads, -1)
        q = self.q_proj(class_tokens(x, layout) if class_only else x).unflatten(-1, heads)
        k = rotate(self.k_proj(x).unflatten(-1, heads), rotary)
        v = self.v_proj(x).unflatten(-1, heads)
        if not class_only:  # the class token is turned by zero
            q = rotate(q, rotary)
        return self.proj(self.norm(attend(q, k, v, backend, layout).flatten(-2)))


class Gate(torch.autograd.Function):
    """`silu(gate) * value`, both `[..., hidden]`; the backward pass computes silu again. No second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, value: Tensor) -> Tensor:
        return F.silu(gate).mul_(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


class SwiGLU(nn.Module):
    """`W2 LN(silu(Wg x + bg) * (Wx x + bx)) + b2` (arXiv 2002.05202, with EVA02's LayerNorm)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(config.width, config.mlp_hidden)
        self.fc1_x = nn.Linear(config.width, config.mlp_hidden)
        self.norm = nn.LayerNorm(config.mlp_hidden, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.mlp_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1_g(x), self.fc1_x(x)
        # torch.compile decides by itself what to fuse and to keep, so it is handed the plain expression.
        gated = F.silu(gate) * value if torch.compiler.is_compiling() else Gate.apply(gate, value)
        return self.fc2(self.norm(gated))


class Block(nn.Module):
    """x + attention(LN(x)), then x + SwiGLU(LN(x))."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rotary: Tensor, backend: str | Attend, layout: Layout | None = None, class_only: bool = False
    ) -> Tensor:
        """One layer.

        x           tokens `[N, T, width]`, or packed `[T, width]` with a layout
        rotary      `[N or 1, T, 1, head_dim / 2, 2]`, packed `[T, 1, head_dim / 2, 2]` (`rotary_table`)
        backend     as `attend` takes it
        class_only  return the class tokens alone, `[N, 1, width]` or packed `[N, width]`
        """
        attended = self.attn(_lowered(self.norm1(x)), rotary, backend, layout, class_only)
        x = (class_tokens(x, layout) if class_only else x) + attended
        return x + self.mlp(_lowered(self.norm2(x)))


def class_tokens(x: Tensor, layout: Layout | None) -> Tensor:
    """The class tokens of `[N, T, C]` as `[N, 1, C]`, or of packed `[T, C]` as `[N, C]`."""
    return x[:, :1] if layout is None else x.index_select(0, layout.class_rows)


def _lowered(x: Tensor) -> Tensor:
    """x in autocast's precision, where autocast is on."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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
