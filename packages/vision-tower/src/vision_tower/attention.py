"""Attention within each image: one function, `attend`, whatever library computes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_tower.packed import ByLength

# Up to here plain products in 16 bits beat PyTorch's fused CPU kernel, forward and backward: at 37 tokens a whole
# training step takes half the time, at 577 attention alone 0.5 to 0.8 of it, at 1297 more. (One thread, AVX512-bf16.
# In float32 the two are equal, and the fused kernel needs less memory.)
PLAIN_ATTENTION_TOKENS = 512

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values `[N, H, T, D]` -> `[N, H, T, D]`; there may be fewer queries."""

HALF = (torch.bfloat16, torch.float16)
_PACKAGES = {"xformers": "xformers.ops", "flash-attn": "flash_attn"}


def choose_backend(wanted: str, device: torch.device) -> str:
    """The backend for a tower on this device: "sdpa", "xformers" or "flash-attn".

    Args:
        wanted: one of `BACKENDS`; "auto" takes xFormers if it is installed and the device is a GPU, else SDPA.
        device: where the tower is.

    Raises:
        ImportError: the wanted package is not installed.
        ValueError: it does not run on this device.
    """
    if wanted == "auto":
        return "xformers" if device.type == "cuda" and _installed("xformers") else "sdpa"
    if wanted in _PACKAGES:
        if not _installed(wanted):
            raise ImportError(
                f"attention is {wanted!r}, but {_PACKAGES[wanted].split('.')[0]} cannot be imported; pip install "
                f"{wanted}, or set attention='sdpa', which is PyTorch's own"
            )
        if device.type != "cuda":
            raise ValueError(
                f"attention is {wanted!r}, which runs on GPUs, and the tower is on the {device.type}; "
                "set attention='sdpa', or 'auto' to choose by device"
            )
    return wanted


def _installed(name: str) -> bool:
    try:
        import_module(_PACKAGES[name])
    except ImportError:
        return False
    return True


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | Attend = "sdpa", layout: ByLength | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each image.

    Args:
        q: `[N, S, H, D]`, S being T, or 1 for the class token alone; packed `[T, H, D]` or `[N, H, D]`.
        k, v: `[N, T, H, D]`; packed `[T, H, D]`, T then being the tokens of all images.
        backend: from `choose_backend`, or a function that computes attention instead.
        layout: of packed tokens.

    Returns:
        The shape of q.

    Raises:
        ValueError: flash-attn and a dtype of more than 16 bits.
    """
    if backend == "flash-attn" and q.dtype not in HALF:
        raise ValueError(f"flash attention works in 16 bits and got {q.dtype}; use torch.autocast, or attention='sdpa'")
    if layout is not None:
        return _attend_packed(q, k, v, backend, layout)
    if isinstance(backend, str) and backend != "sdpa":
        library: Any = import_module(_PACKAGES[backend])
        kernel = library.memory_efficient_attention if backend == "xformers" else library.flash_attn_func
        attended: Tensor = kernel(q, k, v)
        return attended
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if callable(backend):
        return backend(q, k, v).transpose(1, 2)
    if q.device.type == "cpu" and q.dtype in HALF and k.shape[2] <= PLAIN_ATTENTION_TOKENS:
        scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, backend: str | Attend, layout: ByLength) -> Tensor:
    class_only = len(q) != len(k)
    library: Any = import_module(_PACKAGES[backend]) if isinstance(backend, str) and backend in _PACKAGES else None
    out: Tensor
    if backend == "xformers":
        bias = layout.class_mask if class_only else layout.self_mask
        out = library.memory_efficient_attention(q[None], k[None], v[None], bias)[0]
        return out
    kernel: Any = None
    if backend == "flash-attn":
        kernel = library.flash_attn_varlen_func
    elif backend == "sdpa" and q.is_cuda and q.dtype in HALF:
        from torch.nn.attention.varlen import varlen_attn as kernel
    if kernel is not None:
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        of_queries = torch.arange(len(cu), dtype=torch.int32, device=q.device) if class_only else cu
        out = kernel(q, k, v, of_queries, cu, 1 if class_only else longest, longest)
        return out
    # Images of one length form a plain batch: exact, without padding or a mask.
    parts = []
    for images, tokens, length in layout.groups:
        n = images.stop - images.start
        queries = q[images, None] if class_only else torch.unflatten(q[tokens], 0, (n, length))
        keys, values = (torch.unflatten(x[tokens], 0, (n, length)) for x in (k, v))
        parts.append(attend(queries, keys, values, backend).flatten(0, 1))
    return torch.cat(parts)
