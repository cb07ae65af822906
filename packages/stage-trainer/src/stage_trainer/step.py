"""Forward and backward of one step, at once or with gradient caching (Gao et al., 2021, arXiv 2101.06983).

With caching, a batch of any size fits: it is embedded in chunks without keeping anything for the backward pass, the
loss over all embeddings gives their gradients, and each chunk is embedded again, now to send its part of the gradient
into the towers. Dropout and patch dropout are functions of each sample's seed, so the second pass repeats the first.

(Plain accumulation, a loss for each chunk, would be something else: the negatives of a contrastive loss are those of
its batch, and chunks would not see one another's.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from stage_trainer.batch import Batch, Embedded, Part, image_chunks, text_chunks
from stage_trainer.objective import Losses, MultiTask
from stage_trainer.recipe import GradientCache


class StepEngine(Protocol):
    """What a step needs of an engine."""

    objective: MultiTask

    def embed(self, part: Part, patch_dropout: float) -> Embedded:
        """The objective's forward pass, on the engine's device."""

    def backwards(self) -> AbstractContextManager[Callable[[Tensor, bool], None]]:
        """Yields backward(loss, last); the gradients of all calls add up."""

    def forward_passes(self, mine: int) -> int:
        """How many forward passes this rank shall run, if its own part of the batch takes `mine`."""


def forward_backward(
    engine: StepEngine,
    batch: Batch,
    *,
    tasks: tuple[str, ...],
    patch_dropout: float = 0.0,
    group: Any = None,
    cache: GradientCache | None = None,
) -> Losses:
    """Leaves the gradients of the sum of the tasks' losses on the parameters; returns the losses and their statistics.

    Args:
        engine: embeds and goes backward.
        batch: this rank's part of the global batch, on the host.
        tasks: those that take part.
        patch_dropout: share of the patches that images lose.
        group: the ranks whose parts make the global batch.
        cache: sizes of the chunks for gradient caching; None: no caching.
    """
    objective = engine.objective
    if cache is None:
        losses = objective.losses(engine.embed(batch, patch_dropout), batch, tasks=tasks, group=group)
        with engine.backwards() as backward:
            backward(_total(losses), True)
        return losses

    # Texts of like length together: the text tower computes a chunk in as many calls as it has lengths.
    order = batch.text_seeds[:0]
    if batch.texts is not None:
        packed, order = batch.texts.by_length()
        batch = dataclasses.replace(batch, texts=packed, text_seeds=batch.text_seeds[order])
    images, texts = list(image_chunks(batch, cache.images)), list(text_chunks(batch, cache.tokens))
    # What is beyond a rank's own parts is run for the other ranks' sake, and its result dropped.
    images += images[:1] * (engine.forward_passes(len(images)) - len(images))
    texts += texts[:1] * (engine.forward_passes(len(texts)) - len(texts))
    parts = [*images, *texts]
    with torch.no_grad():
        first = [engine.embed(part, patch_dropout) for part in parts]
    image_sizes, text_sizes = [len(e.images) for e in first], [len(e.texts) for e in first]
    own_images, order = 0 if batch.images is None else len(batch.images), order.to(first[0].texts.device)
    sorted_texts = torch.cat([e.texts for e in first])[: len(order)]
    whole = Embedded(
        torch.cat([e.images for e in first])[:own_images].requires_grad_(),
        torch.empty_like(sorted_texts).index_copy(0, order, sorted_texts).requires_grad_(),
        {task: scale.clone().requires_grad_() for task, scale in first[0].scales.items()},
    )
    del first, sorted_texts
    losses = objective.losses(whole, batch, tasks=tasks, group=group)
    # A surrogate whose derivative is the chunk's part of the chain rule; what was dropped gets zeros.
    of_images, of_texts, of_scales = _gradients(_total(losses), whole)
    losses = {task: (loss.detach(), stats) for task, (loss, stats) in losses.items()}
    of_image_chunks, of_text_chunks = _split(of_images, image_sizes), _split(of_texts[order], text_sizes)
    del whole, of_images, of_texts
    with engine.backwards() as backward:
        for number, part in enumerate(parts):
            embedded = engine.embed(part, patch_dropout)
            surrogate = (embedded.images * of_image_chunks[number]).sum()
            surrogate = surrogate + (embedded.texts * of_text_chunks[number]).sum()
            if number == 0:  # the temperatures count once, whatever the number of chunks
                surrogate = surrogate + sum((embedded.scales[task] * g).sum() for task, g in of_scales.items())
            if surrogate.requires_grad:  # not so of what goes through a frozen tower
                backward(surrogate, number == len(parts) - 1)
    return losses


def _total(losses: Losses) -> Tensor:
    return torch.stack([loss for loss, _ in losses.values()]).sum()


def _gradients(loss: Tensor, embedded: Embedded) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of a loss: by the images, the texts, and the scales on which it depends."""
    leaves = (embedded.images, embedded.texts, *embedded.scales.values())
    images, texts, *scales = torch.autograd.grad(loss, leaves, allow_unused=True)
    return (
        torch.zeros_like(embedded.images) if images is None else images,
        torch.zeros_like(embedded.texts) if texts is None else texts,
        {task: g for task, g in zip(embedded.scales, scales, strict=True) if g is not None},
    )


def _split(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Cut into pieces of `sizes`, with zero rows where there are not enough."""
    missing = sum(sizes) - len(rows)
    return (torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows).split(sizes)
