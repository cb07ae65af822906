"""Products of the towers' blocks in 8 bits: `y = x Wᵀ + b`, and the gradient of x.

Numbers are e4m3 (Micikevicius et al., arXiv 2209.05433), with a scale for each row of a matrix: for each token of x and
of the gradient of y, and for each row of the weights, which are cast once a step for either product. Scales are powers
of 2, so that nothing but rounding to four significant bits changes a number. The gradient of a weight stays a product
in bfloat16. That is torchao's recipe "rowwise_with_gw_hp", but that its weights have one scale for the gradient of x.

Gradients in e4m3, since with a scale for each row they do not need e5m2's range: gradients of the weights of a small
text tower are off by 4.8 % instead of 6.3.

Why rows: the scale of a row is known where the row is made, so a compiler can round tokens in the kernel that makes
them, and an embedding does not depend on what else is in its chunk. One scale for all tokens takes a pass over them
first, and for gradients of weights in 8 bits tensor cores would need x and the gradient of y transposed as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from text_tower import TextTower
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from vision_tower import VisionTower

from stage_trainer.engine.cast_once import cast_once

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 2.0**-100  # of a row's largest number: rows of zeros need a scale, too
ALIGNED = 16  # numbers of 8 bits in the 16 bytes that a GPU loads at once; it refuses widths that are no multiple


@contextmanager
def in_float8(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it the blocks of a model's towers multiply in 8 bits, forward and backward; the rest is as in `cast_once`,
    whose conditions hold. Gives what is held: casts to bfloat16, and to 8 bits with their scales.
    """
    holders: list[Any] = []
    with cast_once(model) as casts:
        try:
            for tower in [module for module in model.modules() if isinstance(module, TextTower | VisionTower)]:
                if tower.config.compile:
                    _known_to_the_compiler()
                for linears in tower.joined_linears():
                    holder: Any = linears[0]
                    holder.joined = Float8Product(linears)
                    holders.append(holder)
                    casts += holder.joined.held
            yield casts
        finally:
            for holder in holders:
                holder.joined = None


Pieces = tuple[tuple[int, bool], ...]
"""Of each Linear in a product: its numbers for a token, and whether it has a bias."""


class Float8Product:
    """What some Linears give for the same x, by one product.

    Args:
        linears: their weights and biases are in bfloat16.

    Attributes:
        held: the weights `[out, in]` and their transpose in 8 bits, each with the scales of its rows, and the biases.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.pieces: Pieces = tuple((each.out_features, each.bias is not None) for each in linears)
        self.learned = [each.weight for each in linears] + [each.bias for each in linears if each.bias is not None]
        with torch.no_grad():
            weight = torch.cat([_padded(each.weight) for each in linears])
            biases = [weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in linears]
            bias = torch.cat([F.pad(each, (0, -len(each) % ALIGNED)) for each in biases])
            self.held = (*scaled(weight), *scaled(weight.T.contiguous()), bias)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[…, in]` to `[…, out]` in bfloat16, for each of the Linears."""
        with torch.autocast(x.device.type, enabled=False):
            y = _Product.apply(x.to(torch.bfloat16), *self.held, *self.learned, self.pieces)
        return _split(y, self.pieces, -1)


class _Product(torch.autograd.Function):
    """The weights and biases that are learned are there for their gradients alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor, bias: Tensor,
        *learned_and_pieces: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, columns, column_scales)
        ctx.pieces = learned_and_pieces[-1]
        return _multiplied(x, rows, row_scales, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, columns, column_scales = ctx.saved_tensors
        wants_x, *_ = ctx.needs_input_grad
        wanted = ctx.needs_input_grad[6:-1]
        of_x = _multiplied(grad, columns, column_scales)[..., : x.shape[-1]] if wants_x else None
        flat, count = grad.flatten(0, -2), len(ctx.pieces)
        learned: list[Tensor | None] = [None] * len(wanted)
        if any(wanted[:count]):
            of_weight = flat.T @ _padded(x.flatten(0, -2), rows=False)
            learned[:count] = _split(of_weight[:, : x.shape[-1]], ctx.pieces, 0)
        if any(wanted[count:]):
            of_bias = _split(flat.sum(0), ctx.pieces, 0)
            learned[count:] = [part for part, (_, biased) in zip(of_bias, ctx.pieces, strict=True) if biased]
        return of_x, *[None] * 5, *learned, None


@functools.cache
def _known_to_the_compiler() -> None:
    """Dynamo leaves what is in the function to AOTAutograd, which PyTorch 2.11's cannot look into. Not a decorator:
    that takes seconds to import."""
    torch.compiler.allow_in_graph(_Product)


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[…, k]` in e4m3 with each row divided by its scale, and the scales `[…, 1]`: the least powers of 2 with which
    no number is beyond e4m3's largest."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).float().clamp(min=SMALLEST)
    # A float's bits but the exponent's, rounded up: the same on every device, as a logarithm would not be.
    scale = (((largest / LARGEST).view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (x * scale.reciprocal().to(x.dtype)).to(DTYPE), scale


def _multiplied(x: Tensor, rows: Tensor, row_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[…, k]` times the rows `[n, k]`, in bfloat16."""
    left, scales = scaled(_padded(x.flatten(0, -2), rows=False))
    if x.device.type == "cpu":  # the same, but for the order of sums
        y = (left.float() @ rows.float().T) * scales * row_scales.T
        y = (y if bias is None else y + bias.float()).to(torch.bfloat16)
    else:
        # Fast sums have 22 bits; the numbers have 4.
        y = torch._scaled_mm(
            left, rows.T, scales, row_scales.T, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return y.view(*x.shape[:-1], -1)


def _padded(x: Tensor, rows: bool = True) -> Tensor:
    """A matrix with zeros up to sides that tensor cores take; the rows of tokens may be any number."""
    down, right = -x.shape[0] % ALIGNED if rows else 0, -x.shape[1] % ALIGNED
    return F.pad(x, (0, right, 0, down)) if down or right else x


def _split(whole: Tensor, pieces: Pieces, dim: int) -> tuple[Tensor, ...]:
    """Each Linear's part, without the zeros after it."""
    return torch.split(whole, [size for out, _ in pieces for size in (out, -out % ALIGNED)], dim)[::2]
