"""torch's optimizers, without PyTorch's compiler.

torch keeps its optimizers' methods out of compiled code by decorators that import the compiler when they are first
called: four seconds of each rank's start, whether anything is compiled or not. No step of ours is called from compiled
code, so the methods below are torch's own without the decorators.
"""

from __future__ import annotations

import inspect

import torch


class Optimizer(torch.optim.Optimizer):
    """`torch.optim.Optimizer`."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """`torch.optim.AdamW`, not differentiable."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
