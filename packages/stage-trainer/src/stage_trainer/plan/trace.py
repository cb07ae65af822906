"""What one pass through a tower takes in memory and runs on the device, by running the real modules on fake tensors.

Fake tensors have shapes and no data, so a pass of L/14 at any batch takes a second on a laptop. They lie on the device
that is planned for, "cuda" without a GPU too, so the towers and autocast do what they do there. Three things would ask
the CUDA driver and are told instead: which attention kernel runs (`attend`), that autocast is on (`switch_autocast`),
and the backward pass (`run_backward`). Blocks are alike: a tower of four is run, what deeper ones add is known from it.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any, Literal

import torch
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vision_tower import VisionTower, VisionTowerConfig, patch_keep_indices
from vision_tower.config import as_pair

from stage_trainer.engine.cast_once import cast_once
from stage_trainer.engine.float8 import in_float8
from stage_trainer.plan.backward import run_backward
from stage_trainer.plan.kernels import Tape, Work, of_pass
from stage_trainer.plan.target import HOST, Target

DEPTH = 4
"""Blocks that are run: in a vision tower the last one is of another kind, and two in a row give the difference."""


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward and backward pass through a tower, above its weights and its input.

    Attributes:
        forward: most at any moment of the forward pass.
        held: what the backward pass will need, at the end of the forward pass, the embeddings included.
        backward: (all, gradients of weights among it) at the moments of the backward pass that may have most; none
            for a tower that does not learn.
        gradients: of all weights that learn.
        first, there, back: kernels of a forward pass without a backward one, of one with it, and of that.
        casts: of the weights in 16 bits, if they are there before it (`engine.cast_once`).
    """

    forward: int
    held: int
    backward: tuple[tuple[int, int], ...]
    gradients: int
    first: Work = field(default_factory=Work)
    there: Work = field(default_factory=Work)
    back: Work = field(default_factory=Work)
    casts: int = 0

    def keeping(self, share: float) -> Pass:
        """The same with so much of its memory, but for the gradients."""
        backward = tuple((int(share * (whole - own)) + own, own) for whole, own in self.backward)
        return replace(self, forward=int(share * self.forward), held=int(share * self.held), backward=backward)


def _flash_backward_workspace(grad: Tensor, query: Tensor, *_: object) -> int:
    """flash-attn 2 sums the queries' gradients in float32 and keeps a number for each row, out of sight of dispatch."""
    rows = query.numel() // query.shape[-1]
    return 4 * rows * (32 * math.ceil(query.shape[-1] / 32) + 1)


_WORKSPACES: dict[object, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_workspace,
    torch.ops.aten._flash_attention_backward.default: _flash_backward_workspace,
}

Stretch = tuple[int, int, int]
"""Of a part of a pass: most bytes at any moment, gradients of weights among them, bytes at its end."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make on a device, until they are freed.

    To be entered inside a FakeTensorMode: what is made on a GPU or from fake tensors is fake. All else is real, so that
    the towers can plan their indexes on the host. torch.distributed._tools.mem_tracker finds the same peak on CPUs, but
    needs PyTorch's autograd engine, which GPUs that are not here rule out (`backward`), and knows no workspaces.

    Attributes:
        live: bytes now, above what was there before.
        peak: most since the last `mark`.
        gradients: bytes among them that `gradient` was told of.
        tape: what has run, in sections that a `mark` ends.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.device = device
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self._numbers: dict[int, int] = {}  # of the storages that are there
        self._count = count(1)
        self.tape = Tape(lambda tensor: self._numbers.get(tensor.untyped_storage()._cdata) or next(self._count))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_fake = kwargs.get("device") not in (None, HOST) or any(isinstance(x, FakeTensor) for x in tree_leaves(args))
        with nullcontext() if is_fake else unset_fake_temporarily():
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._enter(tensor.untyped_storage())
        if workspace := _WORKSPACES.get(func):
            self._reach(self.live + workspace(*args))
        if is_fake:
            self.tape.record(func, args, kwargs, result)
        return result

    def know(self, *tensors: Tensor) -> None:
        """These were there before: they do not count."""
        self._numbers.update((tensor.untyped_storage()._cdata, next(self._count)) for tensor in tensors)

    def mark(self) -> Stretch:
        """What was since the last mark; the next stretch begins."""
        ended = self.peak, self.gradients_at_peak, self.live
        self.peak, self.gradients_at_peak = self.live, self.gradients
        self.tape.cut()
        return ended

    def gradient(self, parameter: Tensor) -> None:
        self.gradients += parameter.numel() * parameter.element_size()

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._numbers:
            self._numbers[key] = next(self._count)
            self.live += size
            self._reach(self.live)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._numbers.pop(key, None)
        self.live -= size

    def _reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self.gradients_at_peak = size, self.gradients


@cache
def trace_images(
    config: VisionTowerConfig,
    images: int,
    patch_dropout: float,
    target: Target,
    trainable: Literal["all", "adapters", "projector", "none"],
    again: bool,
    cast: bool = False,
) -> Pass:
    """A pass of so many images.

    Args:
        config: the tower, at the resolution that is set. What `compile` fuses shows in the kernels alone: memory is
            counted as without it.
        images: of one forward pass.
        patch_dropout: share of the patches that images lose.
        target: what computes.
        trainable: what of the tower is trained, as in a recipe.
        again: whether gradients of the weights are there already, and added to.
        cast: whether weights are cast before it, once for several passes.
    """
    with torch.device("meta"):
        tower = VisionTower(replace(config, layers=min(config.layers, DEPTH), attention="sdpa", compile=False))
    tower.set_trainable(trainable)

    with FakeTensorMode(allow_non_fake_inputs=True):
        tower.to_empty(device=target.device)
        pixels = torch.empty(images, 3, *as_pair(config.resolution), dtype=torch.uint8, device=target.device)
        seeds = torch.empty(images, dtype=torch.int64, device=target.device)

        def forward() -> Tensor:
            keep = patch_keep_indices(seeds, config.num_patches, patch_dropout) if patch_dropout else None
            return tower.forward(tower.normalize(pixels), keep=keep, attend=target.attend_images())

        return _run(tower, tower.blocks, config, forward, (pixels, seeds), target, again, cast)


@cache
def trace_texts(
    config: TextTowerConfig, texts: int, length: int, target: Target, trainable: str, again: bool, cast: bool = False
) -> Pass:
    """A pass of so many texts of `length` tokens; only their product matters, and the embeddings. The rest as
    `trace_images`."""
    with torch.device("meta"):
        tower = TextTower(replace(config, layers=min(config.layers, DEPTH), attention="sdpa", compile=False))
    tower.set_trainable(trainable)
    packed = PackedTokens.from_lists([[0] * length] * texts)

    with FakeTensorMode(allow_non_fake_inputs=True):
        tower.to_empty(device=target.device)
        if target.cuda:
            packed = packed.to(target.device)
        seeds = torch.empty(texts, dtype=torch.int64, device=target.device)

        def forward() -> Tensor:
            return tower.forward(packed, sample_seeds=seeds, attend=target.attend_texts())

        inputs = packed.ids, packed.cu_seqlens, seeds
        return _run(tower, tower.encoder.layers, config, forward, inputs, target, again, cast)


def _run(
    tower: nn.Module,
    blocks: nn.ModuleList,
    config: TextTowerConfig | VisionTowerConfig,
    forward: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    target: Target,
    again: bool,
    cast: bool,
) -> Pass:
    """One forward and backward pass of the tower of `config`, by its first `blocks`; `inputs` do not count."""
    learning = [p for p in tower.parameters() if p.requires_grad]
    live = LiveBytes(target.device)
    live.know(*tower.parameters(), *inputs)
    if again:
        for parameter in learning:
            parameter.grad = torch.empty_like(parameter)
            live.know(parameter.grad)
    there, back = list[Stretch](), list[Stretch]()
    borders: set[int] = set()  # nodes of the graph that made the blocks' inputs

    def before_block(_: nn.Module, args: tuple[Any, ...]) -> None:
        target.switch_autocast()  # activation checkpointing has just entered torch.autocast
        if len(there) < len(blocks):  # recomputation comes here too
            there.append(live.mark())
            if args[0].grad_fn is not None:
                borders.add(args[0].grad_fn._sequence_nr())

    def before_node(node: Node) -> None:
        if node._sequence_nr() in borders:
            back.append(live.mark())

    for block in blocks:
        block.register_forward_pre_hook(before_block)
    with warnings.catch_warnings(), ExitStack() as stack:
        way = in_float8 if target.fp8 else cast_once
        casts = stack.enter_context(way(tower)) if cast else []
        live.know(*casts)  # they are older than all else, so their gradients' turn comes last
        borders.add(max((each.grad_fn._sequence_nr() for each in casts if each.grad_fn), default=-1))
        stack.enter_context(live)
        warnings.filterwarnings("ignore", "CUDA is not available", UserWarning)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.bf16):
            target.switch_autocast()
            out = forward()
        there.append(live.mark())
        if learning:
            gradient, graph, out = torch.empty_like(out), [get_gradient_edge(out).node], out.detach()
            run_backward(graph, gradient, before=before_node, learned=None if again else live.gradient)
            back.append(live.mark())
    more, of_casts = config.layers - len(blocks), sum(each.nbytes for each in casts) // len(blocks)
    first, forth, backward = of_pass(live.tape.sections, len(blocks), more, config.compile)
    found, own = _deeper(there, back, blocks, (more, of_casts), again), sum(4 * p.numel() for p in learning)
    found = replace(found, first=first, there=forth, back=backward)
    return replace(found, gradients=own + found.gradients, casts=of_casts * config.layers)


def _deeper(
    there: list[Stretch], back: list[Stretch], blocks: nn.ModuleList, more_of: tuple[int, int], again: bool
) -> Pass:
    """The pass of a tower of more than the `blocks` that were run, with the others' gradients. `there` is what comes
    before them, then one for each; `back` likewise, the other way round; `more_of`: how many more blocks, and bytes of
    the casts of each one's weights, whose gradients stay until the end."""
    depth, top, (more, waiting) = len(blocks), min(2, len(blocks)), more_of
    of_weights = sum(4 * p.numel() for p in blocks[0].parameters() if p.requires_grad)
    added = 0 if again else of_weights  # gradients that a block's backward pass leaves
    # What a block leaves in the forward pass (autocast's copies of the weights live until its end), and for backward.
    passed = there[2][2] - there[1][2] if more else 0
    held = back[1][2] - back[2][2] + added + waiting if more and back else 0
    moments = [
        (peak + more * (held if i < top else added + waiting), of_them + more * (0 if i < top else added))
        for i, (peak, of_them, _) in enumerate(back)
    ]
    return Pass(
        forward=max(peak + (more * passed if i > depth - top else 0) for i, (peak, _, _) in enumerate(there)),
        held=there[-1][2] + more * held,
        backward=tuple(moments),
        gradients=more * of_weights,
    )
