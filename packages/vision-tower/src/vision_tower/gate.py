"""SwiGLU's gate (Shazeer, arXiv 2002.05202) and the LayerNorm behind it (EVA-02, arXiv 2303.11331).

In float32 on a CPU both are one function in C (gate.c), forward and backward, if pip found a compiler to build it with:
half of the time of PyTorch's operations, which go through memory a dozen times (GCC, AVX2), and a tensor of the hidden
size less is kept in every layer.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

# Sums over rows are put together from sums over so many.
ROWS_OF_A_BLOCK = 128


def _load() -> Any:
    """What pip built of gate.c, or None."""
    built = find_spec("vision_tower._gate")
    if built is None or built.origin is None:
        return None
    try:
        library = ctypes.CDLL(built.origin)
        _ = library.gated_norm_1, library.gated_norm_backward_1
    except (OSError, AttributeError) as error:  # AttributeError: of another version
        warnings.warn(
            f"{built.origin} is of no use ({error}), so training on a CPU is slower; install vision-tower again",
            stacklevel=2,
        )
        return None
    return library


LIBRARY = _load()


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
        # What is a kind of tensor of its own, or does not fit, is PyTorch's matter. (Fakes foretell what real ones do.)
        fits = {type(gate), type(value)} <= {Tensor, FakeTensor} and gate.shape == value.shape
        fits = fits and self.weight.shape == self.bias.shape == gate.shape[-1:] and gate.numel() > 0
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
        return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


class _Rows(ctypes.Structure):
    """gate.c's `struct rows`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "value", "weight", "bias", "grad", "out", "mean", "rstd")),
        *((name, ctypes.c_void_p) for name in ("of_gate", "of_value", "of_weight", "of_bias")),
        *((name, ctypes.c_int64) for name in ("count", "n", "block")),
        ("eps", ctypes.c_float),
    )


def _run(function: Any, gate: Tensor, eps: float = 0.0, **others: Tensor) -> None:
    """Calls one of gate.c's with contiguous tensors, on at most as many threads as PyTorch uses."""
    n, count = gate.shape[-1], gate.numel() // gate.shape[-1]
    wanted = {"mean": gate.shape[:-1], "rstd": gate.shape[:-1], "weight": (n,), "bias": (n,)}
    wanted |= dict.fromkeys(("of_weight", "of_bias"), (_blocks(count), n))
    rows = _Rows(count=count, n=n, block=ROWS_OF_A_BLOCK, eps=eps, gate=gate.data_ptr())
    for name, tensor in others.items():
        if tensor.shape != wanted.get(name, gate.shape):
            raise ValueError(f"{name} is {list(tensor.shape)} where gate is {list(gate.shape)}")
        setattr(rows, name, tensor.data_ptr())
    # Threads of their own, started for each call, outlive no fork and no interpreter; a million values take one of them
    # ten times as long as its start.
    number = max(1, min(torch.get_num_threads(), gate.numel() // 2**20))
    ends = [ctypes.c_int64(_blocks(count) * i // number) for i in range(number + 1)]
    threads = [Thread(target=function, args=(ctypes.byref(rows), *part)) for part in pairwise(ends[1:])]
    for thread in threads:
        thread.start()
    function(ctypes.byref(rows), *ends[:2])
    for thread in threads:
        thread.join()


def _blocks(count: int) -> int:
    return -(-count // ROWS_OF_A_BLOCK)


@torch.library.custom_op("vision_tower::gated_norm", mutates_args=())
def _gated_norm(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(what `GatedNorm` returns, the rows' means, 1 / their standard deviations)."""
    gate, value, weight, bias = (t.contiguous() for t in (gate, value, weight, bias))
    results = out, mean, rstd = _like_results(gate)
    _run(LIBRARY.gated_norm_1, gate, eps, value=value, weight=weight, bias=bias, out=out, mean=mean, rstd=rstd)
    return results


@_gated_norm.register_fake
def _like_results(gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[:-1]), gate.new_empty(gate.shape[:-1])


@torch.library.custom_op("vision_tower::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    grad: Tensor, gate: Tensor, value: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gate, value, weight and bias."""
    grad, gate, value, weight, mean, rstd = (t.contiguous() for t in (grad, gate, value, weight, mean, rstd))
    of_gate, of_value = torch.empty_like(gate), torch.empty_like(gate)
    of_weight, of_bias = gate.new_zeros(2, _blocks(mean.numel()), gate.shape[-1])
    _run(
        LIBRARY.gated_norm_backward_1, gate, value=value, weight=weight, grad=grad, mean=mean, rstd=rstd,
        of_gate=of_gate, of_value=of_value, of_weight=of_weight, of_bias=of_bias,
    )  # fmt: skip
    return of_gate, of_value, of_weight.sum(0), of_bias.sum(0)


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
