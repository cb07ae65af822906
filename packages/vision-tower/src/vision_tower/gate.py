"""SwiGLU's gate (Shazeer, arXiv 2002.05202), with less memory than its plain expression keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """`silu(gate) * value`, of one shape and precision, on any device.

    Only the two inputs are kept for the backward pass, which computes silu again: one tensor of the hidden size less in
    every layer, in the same time on a CPU. It cannot be differentiated twice. `torch.compile`, which decides by itself
    what to keep, is handed the plain expression.
    """
    return F.silu(gate) * value if torch.compiler.is_compiling() else _Gated.apply(gate, value)


class _Gated(torch.autograd.Function):
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
