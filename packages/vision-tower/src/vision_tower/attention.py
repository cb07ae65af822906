"""Attention within each image: one function, `attend`, and the libraries that it can be left to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to here plain products in 16 bits beat PyTorch's fused CPU kernel, forward and backward: at 37 tokens a whole
# training step takes half the time, at 577 attention alone 0.5 to 0.8 of it, at 1297 more. (One thread, AVX512-bf16.
# In float32 the two are equal, and the fused kernel needs less memory.)
PLAIN_ATTENTION_TOKENS = 512

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values `[N, H, T, D]` -> `[N, H, T, D]`; of queries there may be fewer."""

_PACKAGES = {"xformers": "xformers.ops", "flash": "flash_attn"}
_INSTALL = {"xformers": "pip install xformers", "flash": "pip install flash-attn"}


def resolve_backend(name: str, device: torch.device) -> str:
    """What `VisionTowerConfig.attention` means on a device: "sdpa", "xformers" or "flash".

    "auto" is xFormers where it is installed and the device is a GPU, and PyTorch's own attention otherwise. Raises
    ImportError for a library that is not installed, ValueError for a device that it does not run on.
    """
    if name == "auto":
        return "xformers" if device.type == "cuda" and _installed("xformers") else "sdpa"
    if name in _PACKAGES:
        if not _installed(name):
            raise ImportError(
                f"attention is {name!r}, but {_PACKAGES[name].split('.')[0]} cannot be imported; {_INSTALL[name]}, or "
                "set attention='sdpa', which is PyTorch's own"
            )
        if device.type != "cuda":
            raise ValueError(
                f"attention is {name!r}, which runs on GPUs, and the tower is on the {device.type}; "
                "set attention='sdpa', or 'auto' to choose by device"
            )
    return name


def _installed(name: str) -> bool:
    try:
        import_module(_PACKAGES[name])
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Layout:
    """Where the images of a packed batch lie in its tokens: one after another, sorted by length, class token first.

    lengths  tokens of each image, its class token among them
    device   of the tokens
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @cached_property
    def ends(self) -> Tensor:
        """Cumulative lengths from 0, int32 `[N + 1]`."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def class_rows(self) -> Tensor:
        """Each image's first token, int64 `[N]`."""
        return self.ends[:-1].long()

    @cached_property
    def groups(self) -> list[tuple[slice, slice, int]]:
        """(images, tokens, length) of each run of images of one length."""
        counts = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        images = pairwise(accumulate((n for _, n in counts), initial=0))
        tokens = pairwise(accumulate((n * length for length, n in counts), initial=0))
        return [(slice(*i), slice(*t), length) for i, t, (length, _) in zip(images, tokens, counts, strict=True)]

    def xformers_bias(self, class_only: bool) -> Any:
        return self._class_bias if class_only else self._self_bias

    @cached_property
    def _self_bias(self) -> Any:
        return _block_diagonal(list(self.lengths), list(self.lengths), self.device)

    @cached_property
    def _class_bias(self) -> Any:
        return _block_diagonal([1] * len(self.lengths), list(self.lengths), self.device)


def _block_diagonal(queries: list[int], keys: list[int], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(queries, keys, device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | Attend = "sdpa", layout: Layout | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each image.

    q        `[N, S, H, D]`, where S is T, or 1 for the class token alone; packed `[T, H, D]` or `[N, H, D]`
    k, v     `[N, T, H, D]`; packed `[T, H, D]`, T then being all images' tokens
    backend  from `resolve_backend`, or what computes attention in its place
    layout   where each image lies, if the tokens are packed

    Returns the shape of q.
    """
    if backend == "flash" and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"flash attention works in 16 bits and got {q.dtype}; use torch.autocast, or attention='sdpa'")
    if layout is not None:
        return _attend_packed(q, k, v, backend, layout)
    if backend == "xformers":
        return import_module(_PACKAGES["xformers"]).memory_efficient_attention(q, k, v)
    if backend == "flash":
        return import_module(_PACKAGES["flash"]).flash_attn_func(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if callable(backend):
        return backend(q, k, v).transpose(1, 2)
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and k.shape[2] <= PLAIN_ATTENTION_TOKENS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, backend: str | Attend, layout: Layout) -> Tensor:
    class_only = len(q) != len(k)
    if backend == "xformers":
        bias = layout.xformers_bias(class_only)
        return import_module(_PACKAGES["xformers"]).memory_efficient_attention(q[None], k[None], v[None], bias)[0]
    kernel: Any = None
    if backend == "flash":
        kernel = import_module(_PACKAGES["flash"]).flash_attn_varlen_func
    elif backend == "sdpa" and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn as kernel
    if kernel is not None:
        q_ends = torch.arange(len(layout.ends), dtype=torch.int32, device=q.device) if class_only else layout.ends
        return kernel(q, k, v, q_ends, layout.ends, 1 if class_only else layout.longest, layout.longest)
    # Images of one length form a plain batch: exact, without padding or a mask.
    out = []
    for images, tokens, length in layout.groups:
        n = images.stop - images.start
        queries = q[images, None] if class_only else q[tokens].unflatten(0, (n, length))
        keys, values = k[tokens].unflatten(0, (n, length)), v[tokens].unflatten(0, (n, length))
        out.append(attend(queries, keys, values, backend).flatten(0, 1))
    return torch.cat(out)
