"""A backward pass over tensors of a device that is not here.

PyTorch's engine asks the CUDA driver for streams as soon as a node of the graph has CUDA tensors, fake ones too
(`GraphTask::stash_current_streams`). Here the nodes are called in the engine's order, and each is let go with all that
it has saved once it is done, so that memory rises and falls as it does under the engine.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.checkpoint import GraphExecGroup

Gradients = list[Tensor | None]
_FORGETS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""Of a Function that is written in Python, 2.11's node goes with the nodes that lead to it, though Python still has it;
so these are kept until it is done, with what they saved."""


@torch.no_grad()
def run_backward(
    graph: list[Node], gradient: Tensor, *, before: Callable[[Node], None], learned: Callable[[Tensor], None] | None
) -> None:
    """Calls every node, from an output's down; leaves get their gradients, or have them added to.

    Args:
        graph: the output's `grad_fn` alone. It is removed from the list, and the caller must drop the output too: a
            node keeps all that follow it alive.
        gradient: of the output.
        before: called with each node once its gradients are complete.
        learned: called with each leaf that gets a gradient.
    """
    root = graph.pop()
    missing = _edges(root)
    arrived: dict[Node, Gradients] = {root: [gradient]}
    turn = count()
    ready = [(0.0, next(turn), root)]
    owners: dict[Node, list[Node]] = {}
    del root, gradient
    with GraphExecGroup():  # what was checkpointed is recomputed once, not for each tensor that it had saved
        while ready:
            *_, node = heapq.heappop(ready)
            before(node)
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                _accumulate(leaf, *arrived.pop(node))
                if learned:
                    learned(leaf)
                continue
            edges, outputs = node.next_functions, _call(node, arrived.pop(node))
            owners.pop(node, None)
            for child, _ in edges if _FORGETS else ():
                if isinstance(child, BackwardCFunction):
                    owners.setdefault(child, []).append(node)
            del node
            for index, (child, slot) in enumerate(edges):
                if child is None:
                    continue
                _deliver(outputs, index, child, slot, arrived.setdefault(child, [None] * len(child._input_metadata)))
                missing[child] -= 1
                if not missing[child]:
                    del missing[child]
                    # The engine's order: leaves at once, then what was made last.
                    rank = -math.inf if hasattr(child, "variable") else -child._sequence_nr()
                    heapq.heappush(ready, (rank, next(turn), child))


def _edges(root: Node) -> Counter[Node]:
    """How many gradients each node waits for."""
    found: Counter[Node] = Counter()
    stack = [root]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                if child not in found:
                    stack.append(child)
                found[child] += 1
    return found


def _call(node: Node, gradients: Gradients) -> Gradients:
    call = node.apply if isinstance(node, BackwardCFunction) else cast("Callable[..., Tensor | tuple[Tensor]]", node)
    outputs = call(*gradients)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _deliver(outputs: Gradients, index: int, child: Node, slot: int, arrived: Gradients) -> None:
    """Adds an output to what has arrived, in the shape and dtype that the forward pass had there."""
    gradient, outputs[index] = outputs[index], None
    if gradient is None:
        return
    expected = child._input_metadata[slot]
    gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
    there = arrived[slot]
    arrived[slot] = gradient if there is None else there + gradient


def _accumulate(leaf: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if leaf.grad is not None:
        leaf.grad += gradient
    else:  # taken as it is, if it lies in memory as the leaf does
        leaf.grad = gradient if gradient.stride() == leaf.stride() else torch.empty_like(leaf).copy_(gradient)
