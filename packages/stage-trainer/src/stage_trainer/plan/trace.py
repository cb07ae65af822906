"""What one pass through a tower takes in memory, by walking the real modules with fake tensors.

Fake tensors have shapes and no data, so L/14 at any batch is walked in a second on a laptop. A dispatch mode sees every
tensor that an operation makes and hears when its memory is let go: live bytes, and their peak. Code that asks a tensor
for its device hears the device that is planned for, so the towers take that device's ways (`_Pretence`).

Blocks are alike: a tower of four is walked, and what deeper ones add is known from it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.attention.varlen  # makes its operations known
import torch.nn.functional as F
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vision_tower import VisionTower, VisionTowerConfig, patch_keep_indices

from stage_trainer.plan.devices import Device

DEPTH = 4
"""Blocks that are walked: in a vision tower the last one is of another kind, and two in a row give the difference."""


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward and backward pass through a tower, above its weights and its input.

    Attributes:
        forward: most at any moment of the forward pass.
        held: what the backward pass will need, at the end of the forward pass, the embeddings included.
        backward: (all, gradients of weights among it) at the moments of the backward pass that may have most; none
            for a tower that does not learn.
        gradients: of all weights that learn.
    """

    forward: int
    held: int
    backward: tuple[tuple[int, int], ...]
    gradients: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed; fake or real.

    Attributes:
        live: bytes now, above what was there before.
        peak: most since the last `mark`.
        gradients: bytes among them that `gradient` was told of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        if workspace := _WORKSPACES.get(func):
            self._reach(self.live + workspace(*args))
        return result

    def know(self, *tensors: Tensor) -> None:
        """These were there before: they do not count."""
        self._seen.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def mark(self) -> tuple[int, int, int]:
        """(peak, gradients at it, live now) since the last mark; the next stretch begins."""
        ended = self.peak, self.gradients_at_peak, self.live
        self.peak, self.gradients_at_peak = self.live, self.gradients
        return ended

    def gradient(self, parameter: Tensor) -> None:
        self.gradients += parameter.numel() * parameter.element_size()

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self._reach(self.live)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self.gradients_at_peak = size, self.gradients


def _flash_backward_workspace(grad: Tensor, query: Tensor, *_: Any) -> int:
    """flash-attn 2 sums the queries' gradients in float32 and keeps a number for each row, out of sight of dispatch."""
    rows = query.numel() // query.shape[-1]
    return 4 * rows * (32 * math.ceil(query.shape[-1] / 32) + 1)


_WORKSPACES: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_workspace,
    torch.ops.torch_attn._varlen_attn_backward.default: _flash_backward_workspace,
}


_fakes: Any = FakeTensor
# A device whose autocast can be switched on where it is absent; the towers only ask whether it is a CPU.
_ELSEWHERE = torch.device("xpu", 0)


class _Pretence(TorchFunctionMode):
    """Fake tensors live on the CPU; whoever asks them hears of another device, and gets what CUDA would do there: its
    attention kernel, and LayerNorm in float32 under autocast, which a CPU leaves in bfloat16.

    (Fakes that really are CUDA tensors have no backward pass on a machine without a GPU.)
    """

    def __init__(self, bf16: bool):
        super().__init__()
        self.bf16, self.active = bf16, False

    def __enter__(self) -> _Pretence:
        self.active = True
        # A fake tensor answers for itself, without asking function modes; torch has to be told the truth.
        truth = self._truth = _fakes.device
        _fakes.device = property(lambda fake: _ELSEWHERE if _a_tower_asks() else truth.fget(fake))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.active = False
        _fakes.device = self._truth
        super().__exit__(*error)

    def keep_up(self, block: nn.Module) -> None:
        """Keeps it up where the block is recomputed, too: torch calls backward with all function modes suspended."""
        forward = block.forward

        def pretending(*args: Any) -> Any:
            if self.active:
                return forward(*args)
            with self, torch.autocast(_ELSEWHERE.type, torch.bfloat16, enabled=self.bf16):
                return forward(*args)

        block.forward = pretending

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.device.__get__:
            return _ELSEWHERE
        if func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if func is F.scaled_dot_product_attention:
            if self.bf16:
                return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        if func is F.layer_norm and self.bf16:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        return func(*args, **kwargs)


def _a_tower_asks() -> bool:
    caller = sys._getframe(2).f_globals["__name__"]
    return caller.partition(".")[0] in ("text_tower", "vision_tower")


@contextlib.contextmanager
def _autocast(precision: str) -> Iterator[None]:
    on = precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=on), torch.autocast(_ELSEWHERE.type, torch.bfloat16, enabled=on):
        yield


@cache
def trace_images(
    config: VisionTowerConfig, images: int, patch_dropout: float, device: Device, precision: str, learns: bool,
    again: bool,
) -> Pass:  # fmt: skip
    """A pass of so many images.

    Args:
        config: the tower, at the resolution that is set.
        images: of one forward pass.
        patch_dropout: share of the patches that images lose.
        device, precision: what computes, "bf16" or "fp32".
        learns: whether the tower is trained.
        again: whether gradients of the weights are there already, and added to.
    """
    # xFormers' and flash-attn's kernels keep what PyTorch's keep.
    shallow = replace(config, layers=min(config.layers, DEPTH), attention="sdpa")
    fake, tower = _fake(lambda: VisionTower(shallow))
    tower.set_trainable("all" if learns else "none")
    with fake:
        sides = config.resolution if isinstance(config.resolution, tuple) else (config.resolution,) * 2
        pixels = torch.empty(images, 3, *sides, dtype=torch.uint8)
        seeds = torch.empty(images, dtype=torch.int64)

    def forward() -> Tensor:
        keep = patch_keep_indices(seeds, config.num_patches, patch_dropout) if patch_dropout else None
        return tower(tower.normalize(pixels), keep=keep)

    return _walk(tower, tower.blocks, forward, (pixels, seeds), config.layers, device, precision, again)


@cache
def trace_texts(
    config: TextTowerConfig, texts: int, length: int, device: Device, precision: str, trainable: str, again: bool
) -> Pass:
    """A pass of so many texts of `length` tokens; only their product matters, and the embeddings. The rest as
    `trace_images`, with `trainable` as in a recipe."""
    shallow = replace(config, layers=min(config.layers, DEPTH), attention="auto", compile=False)
    fake, tower = _fake(lambda: TextTower(shallow).train())
    tower.set_trainable(trainable)
    packed = PackedTokens.from_lists([[0] * length] * texts)
    with fake:
        seeds = torch.empty(texts, dtype=torch.int64)

    variable = precision == "bf16" and device.capability >= (8, 0)
    # The tower itself would ask a GPU that is not here.
    tower._backend = lambda _: "varlen" if variable else "sdpa"

    def forward() -> Tensor:
        return tower(packed, sample_seeds=seeds)

    inputs = packed.ids, packed.cu_seqlens, seeds
    return _walk(tower, tower.encoder.layers, forward, inputs, config.layers, device, precision, again)


def _fake(build: Callable[[], Any]) -> tuple[FakeTensorMode, Any]:
    with torch.device("meta"):
        tower = build()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        return fake, tower.to_empty(device="cpu")


def _walk(
    tower: nn.Module,
    blocks: nn.ModuleList,
    forward: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    layers: int,
    device: Device,
    precision: str,
    again: bool,
) -> Pass:
    """Walks a tower of `len(blocks)` blocks and tells what one of `layers` takes."""
    learning = [p for p in tower.parameters() if p.requires_grad]
    depth, live = len(blocks), LiveBytes()
    live.know(*tower.parameters(), *inputs)
    if again:
        for parameter in learning:
            parameter.grad = torch.empty_like(parameter)
        live.know(*(p.grad for p in learning if p.grad is not None))
    there: list[tuple[int, int, int]] = []  # a stretch before the blocks, then one for each
    back: list[tuple[int, int, int]] = []  # the other way round, the one that ends before the blocks last

    def before_block(_: nn.Module, args: tuple[Any, ...]) -> None:
        if len(there) < depth:  # recomputation comes here too
            there.append(live.mark())
            if args[0].requires_grad:
                args[0].register_hook(lambda _: back.append(live.mark()))

    handles = [block.register_forward_pre_hook(before_block) for block in blocks]
    if not again:
        handles += [p.register_post_accumulate_grad_hook(live.gradient) for p in learning]
    pretence = _Pretence(precision == "bf16") if device.kind == "cuda" else None
    if pretence:
        for block in blocks:
            pretence.keep_up(block)
    with live:
        with pretence or contextlib.nullcontext(), _autocast(precision):
            out = forward()
        there.append(live.mark())
        if learning:
            out.backward(torch.empty_like(out))
            back.append(live.mark())
    for handle in handles:
        handle.remove()

    more, top = layers - depth, min(2, depth)
    of_weights = sum(4 * p.numel() for p in blocks[0].parameters() if p.requires_grad)
    added = 0 if again else of_weights  # gradients that a block's backward pass leaves
    # What a block leaves in the forward pass (autocast's copies of the weights live until its end), and for backward.
    passed = there[2][2] - there[1][2] if more else 0
    held = back[1][2] - back[2][2] + added if more and learning else 0
    moments = [
        (peak + more * (held if i < top else added), gradients + more * (0 if i < top else added))
        for i, (peak, gradients, _) in enumerate(back)
    ]
    return Pass(
        forward=max(peak + (more * passed if i > depth - top else 0) for i, (peak, _, _) in enumerate(there)),
        held=there[-1][2] + more * held,
        backward=tuple(moments),
        gradients=sum(4 * p.numel() for p in learning) + more * of_weights,
    )
