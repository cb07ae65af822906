"""Attention over a packed batch: one call, whatever library computes it.

Sequences are sorted by length (`ByLength`). The variable-length kernels (PyTorch's `varlen_attn`, flash-attn, xformers)
take all of them at once. PyTorch's scaled_dot_product_attention takes those of one length at once, which form a plain
`[n, heads, L, d]` block; so no backend needs padding or a mask.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from text_tower.config import BACKENDS
from text_tower.packed import ByLength
from text_tower.positions import Positions

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""Queries, keys and values `[T, heads, d]`, and the layout -> `[T, heads, d]`."""

AUTO = ("flash-attn", "varlen", "sdpa")  # xformers only when it is asked for
EAGER = ("sdpa", "xformers")  # not compiled: each batch's lengths would need their own graph

# For many short texts of one length, plain products are faster than PyTorch's fused CPU kernel, forward and backward:
# 256 texts of 8 tokens with 4 heads take 0.6 of its time, 128 of 16 tokens 0.75. Longer or fewer texts are slower.
PLAIN_LENGTH_AT_MOST = 16
PLAIN_TEXTS_TIMES_HEADS_FROM = 256


class Attention:
    """Self-attention within each sequence of one batch, positions included.

    Args:
        layout: the batch.
        positions: its position scheme.
        backend: from `choose_backend`, or a function that computes attention instead.
        compiled: whether a compiled block calls it.
    """

    def __init__(self, layout: ByLength, positions: Positions, backend: str | Attend, compiled: bool = False):
        self.layout, self.positions = layout, positions
        # xformers has its own description of the batch, which all blocks share.
        self.plan: Any = _block_diagonal(layout) if backend == "xformers" else layout
        if callable(backend):
            self.attend = backend
            return
        attend = _ATTEND[backend]
        if compiled and backend in EAGER:
            attend, self.plan = _outside_of_graphs(backend), _Unseen(self.plan)
        self.attend = attend if positions.slopes is None else functools.partial(attend, slopes=positions.slopes)

    def __call__(self, qkv: Tensor) -> Tensor:
        """`[T, 3, heads, d]` -> `[T, heads, d]` in the same dtype, tokens in the order of the layout."""
        dtype = qkv.dtype
        with torch.autocast(qkv.device.type, enabled=False):
            if qkv.device.type == "cpu" and dtype == torch.bfloat16:
                # At every length measured (5 to 256 tokens) a CPU's attention was slower in bfloat16 than in float32.
                qkv = qkv.float()
            qk, v = torch.split(qkv, [2, 1], dim=1)
            q, k = self.positions(qk).unbind(1)
            return self.attend(q, k, v.squeeze(1), self.plan).to(dtype)


@functools.cache
def choose_backend(wanted: str, device: str, dtype: torch.dtype, head_dim: int, alibi: bool = False) -> str:
    """The backend for queries of this kind, logged when it is first chosen.

    Args:
        wanted: one of `BACKENDS`; "auto" takes flash-attn if it is installed, else PyTorch's varlen_attn, else SDPA.
        device: a device's type, such as "cuda".
        dtype: of the queries.
        head_dim: channels of a head.
        alibi: whether scores are biased by ALiBi's slopes.

    Raises:
        ValueError: the wanted backend cannot run here; the message says why.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"attention is {wanted!r}; expected one of {list(BACKENDS)}")
    candidates = AUTO if wanted == "auto" else (wanted,)
    obstacles = {name: _obstacle(name, device, dtype, head_dim, alibi) for name in candidates}
    chosen = next((name for name, obstacle in obstacles.items() if not obstacle), None)
    if chosen is None:
        raise ValueError(f"attention={wanted!r} cannot run here: {obstacles[wanted]}; or set attention='auto'")
    passed = "".join(f"; {name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle)
    log.info("attention for %s on %s: %s%s", str(dtype).removeprefix("torch."), device, chosen, passed)
    return chosen


def _obstacle(name: str, device: str, dtype: torch.dtype, head_dim: int, alibi: bool) -> str | None:
    """Why a backend cannot run and what would help; None if it can."""
    if name == "sdpa":
        return None
    if alibi and name in ("varlen", "xformers"):  # with a bias for each head that many lengths share
        return "it has no ALiBi"
    package = {"flash-attn": "flash_attn", "xformers": "xformers"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install {name})"
    if device != "cuda":
        return f"it needs a CUDA device, found {device}"
    if name == "xformers":
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs bfloat16 or float16, found {dtype} (run under torch.autocast)"
    if head_dim % 8 or head_dim > 256:
        return f"it needs heads of 8, 16, … or 256 channels, found {head_dim}"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0, found {torch.cuda.get_device_capability()}"
    return None


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ByLength,
    kernel: Callable[..., Tensor] | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attention of one length at a time, by `kernel` on `[n, heads, L, d]`; None is PyTorch's, with the `slopes`."""
    out = []
    for block in zip(*map(layout.blocks, (q, k, v)), strict=True):
        texts, length, heads, _ = block[0].shape
        many_short = length <= PLAIN_LENGTH_AT_MOST and texts * heads >= PLAIN_TEXTS_TIMES_HEADS_FROM
        chosen: Callable[..., Tensor] = F.scaled_dot_product_attention
        if many_short and q.device.type == "cpu":
            chosen = _plain
        if slopes is not None:
            chosen = functools.partial(_alibi, slopes=slopes, kernel=chosen)
        heads_first = (x.transpose(1, 2) for x in block)
        out.append((kernel or chosen)(*heads_first).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """What `scaled_dot_product_attention` computes, `[n, heads, L, d]`, as two products and a softmax."""
    scores = (q @ k.transpose(-2, -1)).mul_(q.shape[-1] ** -0.5)
    return (scores if attn_mask is None else scores.add_(attn_mask)).softmax(dim=-1) @ v


def _alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, kernel: Callable[..., Tensor]) -> Tensor:
    """`kernel` on `[n, heads, L, d]` with −slope · |i − j| added to the scores.

    The bias depends on i − j alone. With keys in reverse order that is a sum, i + j, so a view of 2L − 1 numbers a head
    is the whole bias: at 8,192 tokens 800 KB instead of 3 GB, and nothing that the backward pass would keep. (PyTorch's
    CPU kernel reads such a view as it is; where a kernel needs aligned rows, PyTorch copies it.)
    """
    length = q.shape[-2]
    distances = torch.arange(1 - length, length, device=q.device).abs()
    line = (-slopes[:, None] * distances).to(q.dtype)
    bias = line.as_strided((len(slopes), length, length), (2 * length - 1, 1, 1))
    return kernel(q, k.flip(-2), v.flip(-2), attn_mask=bias)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: ByLength) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Versions differ in the arguments after these seven (is_causal became keywords); full attention needs none of them.
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    return varlen_attn(q, k, v, cu, cu, longest, longest)  # type: ignore[return-value]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: ByLength, slopes: Tensor | None = None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = layout.cu_seqlens, layout.max_seqlen
    biased = {} if slopes is None else {"alibi_slopes": slopes}
    out: Tensor = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **biased)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, block_diagonal: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=block_diagonal)[0]
    return out


def _block_diagonal(layout: ByLength) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([length for length, n in layout.groups for _ in range(n)])


class _Unseen:
    """A plan that compiled blocks hand on as it is. PyTorch 2.11's compiler looks into the lists and tensors among the
    arguments of a function that it leaves out, and would compile anew for each number of lengths."""

    def __init__(self, plan: Any):
        self.plan = plan


@functools.cache
def _outside_of_graphs(backend: str) -> Any:
    """The backend for compiled blocks. Not a decorator: `torch.compiler.disable` takes seconds to import."""
    attend = _ATTEND[backend]

    @functools.wraps(attend)
    def outside(q: Tensor, k: Tensor, v: Tensor, held: _Unseen, **slopes: Tensor) -> Tensor:
        return attend(q, k, v, held.plan, **slopes)

    return cast(Any, torch.compiler).disable(outside)


_ATTEND: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "varlen": _varlen,
    "flash-attn": _flash_attn,
    "xformers": _xformers,
}
