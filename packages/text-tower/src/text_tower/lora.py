"""A Linear and an Embedding that carry low-rank adapters (LoRA, arXiv 2106.09685) beside their weight.

`weight` keeps its plain name, so a tower without adapters has exactly the parameters of the published layout. Each
adapter has its own parameters, `lora_A_k` and `lora_B_k`: one that takes no part in a step has no gradient, and neither
momentum nor weight decay changes it. Adapter k adds `scale · B A` to a Linear's weight and `scale · A B` to a table;
adapter None adds nothing. A Linear forms the sum once for a call where that is less work than two thin products for
each token (`AdaptedLinear.forms_sum`); a table, of which a batch reads few rows, never does.

On disk the adapters of a module are stacked, `lora_A` and `lora_B`, as in jina's layout: see `stacked`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # as XLM-RoBERTa
Joined = Callable[[Tensor], tuple[Tensor, ...]]
"""What computes a Linear's `x Wᵀ + b` in its place, as one of a tuple (`TextTower.joined_linears`)."""
_OWN = re.compile(r"(.+\.lora_[AB])_(\d+)")


class _Adapted(nn.Module):
    """Base of both modules, which have `weight`."""

    weight: Tensor
    adapters: int

    def _add_adapters(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        # Parameters of the module itself, not of a list in it: ZeRO 3 gathers a module's own before its forward.
        for k in range(self.adapters):
            self.register_parameter(f"lora_A_{k}", nn.Parameter(torch.empty(a)))
            self.register_parameter(f"lora_B_{k}", nn.Parameter(torch.empty(b)))
            self.reset_adapter(k)

    def adapter(self, k: int) -> tuple[Tensor, Tensor]:
        """(A, B) of adapter k."""
        k = next(known for known in range(self.adapters) if known == k)  # to PyTorch 2.11's compiler k is no constant
        return getattr(self, f"lora_A_{k}"), getattr(self, f"lora_B_{k}")

    def reset_adapter(self, k: int) -> None:
        """A uniform (Kaiming), B zero: a new adapter changes nothing."""
        a, b = self.adapter(k)
        if a.is_meta:
            return
        nn.init.uniform_(a, -1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]))
        nn.init.zeros_(b)


class AdaptedLinear(_Adapted, nn.Linear):
    """`y = x (W + scale · B A)ᵀ + b`; an adapter's A is `[rank, in]` and its B `[out, rank]`.

    Args:
        in_features, out_features: as in nn.Linear.
        adapters: how many; with 0 this is a plain Linear.
        rank, scale: of the adapters.
        bias: whether there is b.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        adapters: int = 0,
        rank: int = 0,
        scale: float = 1.0,
        bias: bool = True,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.scale, self.adapters = scale, adapters
        self.summed: int | None = None  # the adapter that is in the weight for the moment, see `cast`
        self.joined: Joined | None = None
        self._add_adapters((rank, in_features), (out_features, rank))

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing numbers there imports PyTorch's compiler, and is for nothing
            nn.init.normal_(self.weight, std=INIT_STD)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, adapter: int | None = 0) -> Tensor:
        """`[T, in]` to `[T, out]`."""
        if self.summed is not None and adapter != self.summed:
            raise RuntimeError(f"the weight holds adapter {self.summed} for the moment, and {adapter} was asked for")
        if not self.adapters or adapter is None or self.summed is not None:
            return self._product(x)
        if self.joined is None and self.forms_sum(x.shape[0], adapter):
            with torch.autocast(x.device.type, enabled=False):  # the sum is rounded once, by the product that reads it
                weight = self.merged(adapter)
            return F.linear(x, weight, self.bias)
        a, b = self.adapter(adapter)
        return torch.add(self._product(x), F.linear(F.linear(x, a), b), alpha=self.scale)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.joined is None else self.joined(x)[0]

    def forms_sum(self, tokens: int, adapter: int) -> bool:
        """Whether a call forms `W + scale · B A`, in · out numbers, rather than two thin products for each token, of
        (in + out) numbers a token.

        Not if the adapter learns and W does not: A and B would then need W's gradient, as large a product as the
        forward pass, which nothing else reads. Whether gradients are wanted at the moment has no influence, so that a
        pass without them computes what is repeated with them. All Linears of a block have the same smaller side, so
        compiled blocks have two graphs at most.
        """
        return not self._learns_alone(adapter) and tokens > min(self.in_features, self.out_features)

    def _learns_alone(self, adapter: int) -> bool:
        return self.adapter(adapter)[0].requires_grad and not self.weight.requires_grad

    def cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values in `dtype` for several forward and backward passes with the first adapter, to stand in place of the
        parameters; `summed = None` ends it, once these are back. They hold the adapter in the weight, unless it learns
        alone."""
        if not self.adapters or self._learns_alone(0):
            return {name: parameter.to(dtype) for name, parameter in self.named_parameters(recurse=False)}
        self.summed = 0
        weight: Tensor = _Sum.apply(self.weight, *self.adapter(0), self.scale, dtype)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias.to(dtype)}

    def merged(self, adapter: int | None) -> Tensor:
        """Weight `[out, in]` with the adapter added."""
        if not self.adapters or adapter is None:
            return self.weight
        a, b = self.adapter(adapter)
        return torch.add(self.weight, b @ a, alpha=self.scale)


class _Sum(torch.autograd.Function):
    """`W + scale · B A`, rounded once. Unlike PyTorch's operators it can go backward once for each of several passes
    that use it: all that this needs are parameters, which stay."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.adapter, ctx.scale = (a, b), scale
        return torch.add(weight, b @ a, alpha=scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.adapter
        grad = grads[0].to(a.dtype)
        of_weight, of_a, of_b, *_ = ctx.needs_input_grad
        scaled = grad * ctx.scale
        return (
            grad if of_weight else None,
            b.T @ scaled if of_a else None,
            scaled @ a.T if of_b else None,
            None,
            None,
        )


class AdaptedEmbedding(_Adapted, nn.Embedding):
    """`W[i] + scale · A[i] B`; an adapter's A is `[rows, rank]` and its B `[rank, width]`."""

    def __init__(self, rows: int, width: int, adapters: int = 0, rank: int = 0, scale: float = 1.0):
        nn.Embedding.__init__(self, rows, width)
        self.scale, self.adapters = scale, adapters
        self._add_adapters((rows, rank), (rank, width))

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, ids: Tensor, adapter: int | None = 0) -> Tensor:
        y = F.embedding(ids, self.weight)
        if not self.adapters or adapter is None:
            return y
        a, b = self.adapter(adapter)
        return torch.add(y, F.embedding(ids, a) @ b, alpha=self.scale)

    def merged(self, adapter: int | None) -> Tensor:
        """Table `[rows, width]` with the adapter added."""
        if not self.adapters or adapter is None:
            return self.weight
        a, b = self.adapter(adapter)
        return self.weight + self.scale * a @ b


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of a tower, or a tensor of `stacked`, belongs to its adapters."""
    return re.search(r"\.lora_[AB](_\d+)?$", parameter_name) is not None


def adapter_number(parameter_name: str) -> int | None:
    """Which adapter a parameter of a tower is of; None for the weights that all share."""
    match = _OWN.fullmatch(parameter_name)
    return int(match[2]) if match else None


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's state dict as on disk: a module's adapters in one `lora_A` and one `lora_B`, on dimension 0."""
    result: dict[str, Tensor] = {}
    halves: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        if match := _OWN.fullmatch(name):
            halves.setdefault(match[1], []).append(tensor)  # in order: that is how they were registered
        else:
            result[name] = tensor
    return result | {name: _stack(tensors) for name, tensors in halves.items()}


def _stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_meta:  # stacking there imports PyTorch's compiler
        return tensors[0].new_empty(len(tensors), *tensors[0].shape)
    return torch.stack(tensors)


def unstacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stacked`."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if is_adapter(name):
            # Copies: parameters that are views of one tensor would keep all of it alive.
            result |= {f"{name}_{k}": half.clone() for k, half in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def add_fresh_adapters(model: nn.Module) -> None:
    """Gives adapters that are still on the meta device memory and initial values."""
    for module in (m for m in model.modules() if isinstance(m, _Adapted)):
        for k in range(module.adapters):
            if module.adapter(k)[0].is_meta:
                for name, half in zip((f"lora_A_{k}", f"lora_B_{k}"), module.adapter(k), strict=True):
                    setattr(module, name, nn.Parameter(module.weight.new_empty(half.shape)))
                module.reset_adapter(k)
