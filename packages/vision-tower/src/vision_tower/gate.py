"""SwiGLU's gate (Shazeer, arXiv 2002.05202) and the LayerNorm behind it (EVA-02, arXiv 2303.11331).

In float32 on a CPU both are one function in C (gate.c), forward and backward, if pip found a compiler to build it with:
half of the time of PyTorch's operations, which go through memory a dozen times, and a tensor of the hidden size less is
kept in every layer. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_built = find_spec("vision_tower._gate")
LIBRARY: Any = ctypes.CDLL(_built.origin) if _built is not None and _built.origin else None
Tensors = dict[str, Tensor]

# Sums over rows are put together from sums over so many, whatever the number of threads: the same bits with each.
ROWS_OF_A_SUM = 128


class GatedNorm(nn.LayerNorm):
    """`LN(silu(gate) * value)`, both `[..., hidden]`; weights and their names are LayerNorm's.

    It cannot be differentiated twice. `torch.compile`, which decides by itself what to fuse and to keep, is handed the
    plain expression.
    """

    def __init__(self, hidden: int, eps: float = 1e-5):
        super().__init__(hidden, eps=eps)

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        if torch.compiler.is_compiling():
            return super().forward(F.silu(gate) * value)
        tensors = gate, value, self.weight, self.bias
        fits = gate.shape == value.shape and gate.shape[-1:] == self.weight.shape
        if LIBRARY is not None and fits and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors):
            return _GatedNorm.apply(*tensors, self.eps)[0]
        return super().forward(_Gated.apply(gate, value))


class _Gated(torch.autograd.Function):
    """`silu(gate) * value`, of which only the two inputs are kept for the backward pass; it computes silu again."""

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
        of_gate = grad * value
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, F.silu(gate).mul_(grad)


class _Rows(ctypes.Structure):
    """gate.c's `struct rows`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "value", "weight", "bias", "grad", "out", "mean", "rstd")),
        *((name, ctypes.c_void_p) for name in ("of_gate", "of_value", "of_weight", "of_bias")),
        *((name, ctypes.c_int64) for name in ("count", "n", "block")),
        ("eps", ctypes.c_float),
    )


def _run(function: Callable[[Any], None], eps: float, shared: Tensors, of_rows: Tensors, of_blocks: Tensors) -> None:
    """Calls gate.c on as many threads as PyTorch uses, with what all rows share, each row has and each block has."""
    *leading, n = of_rows["gate"].shape
    count = math.prod(leading)

    def part(first: int, last: int) -> None:
        start = first * ROWS_OF_A_SUM
        rows = _Rows(count=min(count, last * ROWS_OF_A_SUM) - start, n=n, block=ROWS_OF_A_SUM, eps=eps)
        for tensors, at, of in (shared, 0, 1), (of_rows, start, count), (of_blocks, first, _blocks(count)):
            for name, tensor in tensors.items():
                setattr(rows, name, tensor.data_ptr() + at * (tensor.nbytes // of))
        function(ctypes.byref(rows))

    threads = min(torch.get_num_threads(), _blocks(count))
    if threads == 1:
        part(0, _blocks(count))
    elif threads:
        ends = [_blocks(count) * i // threads for i in range(threads + 1)]
        list(_threads(threads, os.getpid()).map(part, ends, ends[1:]))


def _blocks(count: int) -> int:
    return -(-count // ROWS_OF_A_SUM)


@lru_cache
def _threads(number: int, _process: int) -> ThreadPoolExecutor:
    """Kept for the process: one that was forked has none of its parent's threads."""
    return ThreadPoolExecutor(number)


@torch.library.custom_op("vision_tower::gated_norm", mutates_args=())
def _gated_norm(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(what `GatedNorm` returns, the rows' means, 1 / their standard deviations)."""
    results = out, mean, rstd = _like_results(gate)
    gate, value = gate.contiguous(), value.contiguous()
    shared = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    of_rows = {"gate": gate, "value": value, "out": out, "mean": mean, "rstd": rstd}
    _run(LIBRARY.gated_norm, eps, shared, of_rows, {})
    return results


@_gated_norm.register_fake
def _like_results(gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[:-1]), gate.new_empty(gate.shape[:-1])


@torch.library.custom_op("vision_tower::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    grad: Tensor, gate: Tensor, value: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gate, value, weight and bias."""
    of_gate, of_value = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    sums = gate.new_zeros(2, _blocks(mean.numel()), gate.shape[-1])
    of_rows = {"grad": grad.contiguous(), "gate": gate.contiguous(), "value": value.contiguous()}
    of_rows |= {"mean": mean, "rstd": rstd, "of_gate": of_gate, "of_value": of_value}
    of_blocks = {"of_weight": sums[0], "of_bias": sums[1]}
    _run(LIBRARY.gated_norm_backward, 0.0, {"weight": weight.contiguous()}, of_rows, of_blocks)
    return of_gate, of_value, sums[0].sum(0), sums[1].sum(0)


@_gated_norm_backward.register_fake
def _like_gradients(
    grad: Tensor, gate: Tensor, value: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), torch.empty_like(weight), torch.empty_like(weight)


def _one_by_one(op: Any) -> Callable[..., Any]:
    """`op` under torch.func.vmap."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        pairs = list(zip(arguments, in_dims, strict=True))
        results = [op(*(a if d is None else a.select(d, i) for a, d in pairs)) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


_gated_norm.register_vmap(_one_by_one(_gated_norm))
_gated_norm_backward.register_vmap(_one_by_one(_gated_norm_backward))


class _GatedNorm(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_gated_norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        gate, value, weight, *_ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(gate, value, weight, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_gated_norm_backward(grad, *ctx.saved_tensors), None
