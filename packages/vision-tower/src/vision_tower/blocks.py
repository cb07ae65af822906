"""EVA02's layers: pre-norm blocks of rotary attention and SwiGLU, each with a LayerNorm before its last product.

Parameter names are those of timm's `eva02_*` models. What differs is for speed and memory (`benchmarks/cpu.py` and
`benchmarks/memory.py` measure the whole):

- the class token has a row in the rotary table (a rotation by zero), so the tokens are never split and joined again,
  and the rotation is one complex product (positions.py);
- short sequences in 16 bits on a CPU take two plain matrix products instead of a fused kernel (attention.py);
- the last block computes the class token alone, the only one read after it (B/16: 5 % of a step on a CPU);
- under autocast the normalised tokens are cast once, not once for each product that reads them, and a GPU's LayerNorm
  of tokens in 16 bits is one kernel, without a cast before and after it;
- with `residual_in_fp32=False` the tokens themselves have 16 bits under autocast, from the first block to the last;
- in 16 bits queries, keys and values are one product, and so are SwiGLU's gate and value (`products`), with zeros up
  to a width that tensor cores take at full speed (`ALIGNED`);
- SwiGLU's gate keeps only its inputs for the backward pass, one tensor of the MLP's width less in every layer.

Tried on a CPU and left out, because the whole step took the same time: adding in place to the residual stream and to
its gradient; one product for queries, keys and values in float32 (186.0 and 185.4 ms for 1576 tokens of 768).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vision_tower.attention import HALF, Attend, attend
from vision_tower.config import VisionTowerConfig
from vision_tower.lora import joined_of, linear
from vision_tower.packed import ByLength
from vision_tower.positions import rotate


class PatchProjection(nn.Conv2d):
    """A convolution's weights under its name, applied to patches `[..., 3 * patch * patch]` that are already cut out.

    This product takes 0.9 of the convolution's time in float32 and 0.4 in bfloat16 (forward and backward, one thread
    of an AVX2 processor), and dropped patches are never computed.
    """

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """timm's name for the one projection in it."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, patch, patch)

    def forward(self, patches: Tensor) -> Tensor:
        x: Tensor = self.proj(patches)
        return x


ALIGNED = 8
"""Numbers of 16 bits in the 16 bytes that a GPU's matrix products load at once. Where rows are no multiple of that, as
the 2,730 of L/14's SwiGLU are not, cuBLAS takes a kernel of an older generation."""


def products(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """What each Linear gives for x; in 16 bits by one product, with their weights joined for the call.

    One product reads x once and, backward, adds up its gradient in float32. Whoever hooks into a Linear's call gets its
    call: ZeRO 3 makes weights whole there. So does another class in its place, such as an adapter's or a quantized one.
    """
    if not all(type(each) is nn.Linear for each in linears):
        return tuple(each(x) for each in linears)
    if (joined := joined_of(linears[0])) is not None:
        return joined(x)
    if not _in_half(x, *linears):
        return tuple(each(x) for each in linears)
    pads = [-each.out_features % ALIGNED for each in linears]
    biases = [each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in linears]
    weight, bias = (
        torch.cat([_with_zeros(part.to(x.dtype), pad) for part, pad in zip(parts, pads, strict=True)])
        for parts in ([each.weight for each in linears], biases)
    )
    sizes = [size for each, pad in zip(linears, pads, strict=True) for size in (each.out_features, pad)]
    return torch.split(F.linear(x, weight, bias), sizes, dim=-1)[::2]


def _with_zeros(rows: Tensor, count: int) -> Tensor:
    """So many more rows, of zeros."""
    return F.pad(rows, (*(0, 0) * (rows.ndim - 1), 0, count)) if count else rows


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    """What the Linear gives for x; under autocast in 16 bits with zeros after the last number of each row."""
    if (joined := joined_of(linear)) is not None and type(linear) is nn.Linear:
        return joined(x)[0]
    x, pad = lowered(x), -linear.in_features % ALIGNED
    if not pad or not _in_half(x, linear):
        out: Tensor = linear(x)
        return out
    weight = F.pad(linear.weight.to(x.dtype), (0, pad))
    return F.linear(F.pad(x, (0, pad)), weight, None if linear.bias is None else linear.bias.to(x.dtype))


def _in_half(x: Tensor, *linears: nn.Linear) -> bool:
    """Whether x has 16 bits and nobody but this file has a say in the products."""
    plain = (type(each) is nn.Linear and not each._forward_hooks and not each._forward_pre_hooks for each in linears)
    return x.dtype in HALF and all(plain)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that takes a GPU's tokens in 16 bits as they are. Autocast makes them float32 before it, and the
    next product rounds what comes out of it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" or x.dtype not in HALF or self.weight.dtype != torch.float32:
            return super().forward(x)  # a CPU's kernel takes both dtypes at once
        return self.in_16_bits(x)

    def in_16_bits(self, x: Tensor) -> Tensor:
        """One kernel, which computes in float32 inside; it wants weight and bias in the dtype of x."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Self-attention with rotary positions; queries and values have a bias, keys have none (it would cancel)."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = linear(config, width, width)
        self.k_proj = linear(config, width, width, bias=False)
        self.v_proj = linear(config, width, width)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps) if config.attention_norm else nn.Identity()
        self.proj = linear(config, width, width)

    def forward(
        self, x: Tensor, rotary: Tensor, backend: str | Attend, layout: ByLength | None = None, class_only: bool = False
    ) -> Tensor:
        """Arguments as for `Block.forward`; returns what is added to the tokens."""
        if class_only:
            q = product(class_tokens(x, layout), self.q_proj)
            k, v = products(x, self.k_proj, self.v_proj)
        else:
            q, k, v = products(x, self.q_proj, self.k_proj, self.v_proj)
        # Rotation makes new queries and keys; values that stayed a part of the product would keep all of it in memory.
        q, k, v = (torch.unflatten(each, -1, (self.heads, -1)) for each in (q, k, v.contiguous()))
        k = rotate(k, rotary)
        if not class_only:  # a class token turns by zero
            q = rotate(q, rotary)
        return product(self.norm(attend(q, k, v, backend, layout).flatten(-2)), self.proj)


class Gate(torch.autograd.Function):
    """`silu(gate) * value`, both `[..., mlp_width]`; the backward pass computes silu again. No second derivative."""

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
        self.fc1_g = linear(config, config.width, config.mlp_width)
        self.fc1_x = linear(config, config.width, config.mlp_width)
        self.norm = LayerNorm(config.mlp_width, eps=config.layer_norm_eps)
        self.fc2 = linear(config, config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = products(x, self.fc1_g, self.fc1_x)
        # torch.compile decides what to fuse and what to keep, so it gets the plain expression.
        gated = F.silu(gate) * value if torch.compiler.is_compiling() else Gate.apply(gate, value)
        return product(self.norm(gated), self.fc2)


class Block(nn.Module):
    """x + attention(LN(x)), then x + SwiGLU(LN(x))."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = SelfAttention(config)
        self.norm2 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rotary: Tensor, backend: str | Attend, layout: ByLength | None = None, class_only: bool = False
    ) -> Tensor:
        """One layer.

        Args:
            x: tokens `[N, T, width]`, or packed `[T, width]` with a layout.
            rotary: `[N or 1, T, 1, head_dim / 2, 2]`, packed `[T, 1, head_dim / 2, 2]` (`rotary_table`).
            backend: as for `attend`.
            layout: of packed tokens.
            class_only: return the class tokens alone, `[N, 1, width]` or packed `[N, width]`.
        """
        attended = self.attn(lowered(self.norm1(x)), rotary, backend, layout, class_only)
        x = (class_tokens(x, layout) if class_only else x) + attended
        out: Tensor = x + self.mlp(lowered(self.norm2(x)))
        return out

    def joined_linears(self, class_only: bool) -> list[tuple[nn.Linear, ...]]:
        """As `VisionTower.joined_linears`."""
        attn, mlp = self.attn, self.mlp
        of_x: list[tuple[nn.Linear, ...]] = [(attn.q_proj, attn.k_proj, attn.v_proj)]
        if class_only:
            of_x = [(attn.q_proj,), (attn.k_proj, attn.v_proj)]
        return [*of_x, (attn.proj,), (mlp.fc1_g, mlp.fc1_x), (mlp.fc2,)]


def class_tokens(x: Tensor, layout: ByLength | None) -> Tensor:
    """The class tokens of `[N, T, C]` as `[N, 1, C]`, or of packed `[T, C]` as `[N, C]`."""
    return x[:, :1] if layout is None else x.index_select(0, layout.class_rows)


def lowered(x: Tensor) -> Tensor:
    """x in autocast's dtype, if autocast is on."""
    # Not torch.amp.is_autocast_available, which PyTorch 2.11 cannot compile; a meta device has no autocast.
    if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def initialize(blocks: Iterable[Any]) -> None:
    """EVA's initialization: weights normal with std 0.02, biases 0, and the two projections that write to the residual
    stream divided by sqrt(2 * depth of the block)."""
    for depth, block in enumerate(blocks, start=1):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            block.attn.proj.weight.div_((2.0 * depth) ** 0.5)
            block.mlp.fc2.weight.div_((2.0 * depth) ** 0.5)
