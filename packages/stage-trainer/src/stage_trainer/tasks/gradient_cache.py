"""Gradient caching (Gao et al., 2021, arXiv 2101.06983): a contrastive loss over a batch of any size.

The batch is embedded in chunks without keeping anything for the backward pass, the loss over all embeddings gives their
gradients, and each chunk is embedded again, now to send its part of the gradient into the towers. Dropout and patch
dropout are functions of each sample's seed, so the second pass repeats the first.

(Plain accumulation, with a loss for each chunk, would compute another loss: the negatives of a contrastive loss are
those of its batch, and chunks would not see one another's.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from stage_trainer.batch import Batch, Embedded, Part, image_chunks, text_chunks
from stage_trainer.engine import Engine
from stage_trainer.recipe import GradientCache
from stage_trainer.tasks.task import Losses


def backward_through_chunks(
    engine: Engine,
    batch: Batch,
    losses_of: Callable[[Embedded], Losses],
    chunks: GradientCache,
    **options: float,
) -> Losses:
    """Leaves the gradients of the sum of the losses on the parameters; returns the losses, detached.

    Args:
        engine: runs an objective that returns `Embedded`.
        batch: this rank's part of the global batch, on the host.
        losses_of: the losses over the whole part of the batch.
        chunks: the most images and tokens of one forward pass.
        options: of the objective's forward pass.
    """
    # Texts of similar length together: the text tower computes a chunk in as many calls as it has lengths.
    sorted_batch, order = _by_length(batch)
    parts = _parts(engine, sorted_batch, chunks)
    with torch.no_grad():
        first = [engine.forward(part, **options) for part in parts]
    image_sizes, text_sizes = [len(e.images) for e in first], [len(e.texts) for e in first]
    order = order.to(first[0].texts.device)
    whole = _whole(first, 0 if batch.images is None else len(batch.images), order)
    del first
    losses = losses_of(whole)
    of_images, of_texts, of_scalars = _gradients(total(losses), whole)
    losses = {name: (loss.detach(), stats) for name, (loss, stats) in losses.items()}
    of_image_chunks, of_text_chunks = _split(of_images, image_sizes), _split(of_texts[order], text_sizes)
    del whole, of_images, of_texts
    with engine.backwards() as backward:
        for number, part in enumerate(parts):
            embedded = engine.forward(part, **options)
            # A surrogate whose derivative is the chunk's part of the chain rule; what was dropped gets zeros.
            surrogate = (embedded.images * of_image_chunks[number]).sum()
            surrogate = surrogate + (embedded.texts * of_text_chunks[number]).sum()
            if number == 0:  # temperatures and biases count once, whatever the number of chunks
                surrogate = surrogate + sum((embedded.scalars[name] * g).sum() for name, g in of_scalars.items())
            if surrogate.requires_grad:  # not if the chunk went through a frozen tower
                backward(surrogate, number == len(parts) - 1)
    return losses


def total(losses: Losses) -> Tensor:
    """The sum of the losses."""
    return torch.stack([loss for loss, _ in losses.values()]).sum()


def _by_length(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with its texts sorted by length, and the position that each had before."""
    if batch.texts is None:
        return batch, batch.text_seeds[:0]
    packed, order = batch.texts.by_length()
    return dataclasses.replace(batch, texts=packed, text_seeds=batch.text_seeds[order]), order


def _parts(engine: Engine, batch: Batch, chunks: GradientCache) -> list[Part]:
    """The chunks; where other ranks have more, some are repeated, and their results dropped."""
    images, texts = list(image_chunks(batch, chunks.images)), list(text_chunks(batch, chunks.tokens))
    images += images[:1] * (engine.forward_passes(len(images)) - len(images))
    texts += texts[:1] * (engine.forward_passes(len(texts)) - len(texts))
    return [*images, *texts]


def _whole(parts: list[Embedded], images: int, order: Tensor) -> Embedded:
    """The embeddings of all parts, in the batch's order, as leaves of a graph."""
    texts = torch.cat([e.texts for e in parts])[: len(order)]
    return Embedded(
        torch.cat([e.images for e in parts])[:images].requires_grad_(),
        torch.empty_like(texts).index_copy(0, order, texts).requires_grad_(),
        {name: scalar.clone().requires_grad_() for name, scalar in parts[0].scalars.items()},
    )


def _gradients(loss: Tensor, embedded: Embedded) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of a loss: by the images, the texts, and the scalars on which it depends."""
    leaves = (embedded.images, embedded.texts, *embedded.scalars.values())
    images, texts, *scalars = torch.autograd.grad(loss, leaves, allow_unused=True)
    return (
        torch.zeros_like(embedded.images) if images is None else images,
        torch.zeros_like(embedded.texts) if texts is None else texts,
        {name: g for name, g in zip(embedded.scalars, scalars, strict=True) if g is not None},
    )


def _split(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Cut into pieces of `sizes`, with zero rows where there are not enough."""
    missing = sum(sizes) - len(rows)
    return torch.split(torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows, sizes)
