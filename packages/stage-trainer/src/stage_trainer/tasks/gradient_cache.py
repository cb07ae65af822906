"""Gradient caching (Gao et al., 2021, arXiv 2101.06983): a contrastive loss over a batch of any size.

The batch is embedded in chunks without keeping anything for the backward pass, the loss over all embeddings gives their
gradients, and each chunk is embedded again, now to send its part of the gradient into the towers. Dropout and patch
dropout are functions of each sample's seed, so the second pass repeats the first.

Both passes compute in 8 bits, or neither does (`Stage.fp8`). The first alone would be faster, too, but not the gradient
of anything: the loss's gradients at its embeddings would go into towers that give others.

(Plain accumulation, with a loss for each chunk, would compute another loss: the negatives of a contrastive loss are
those of its batch, and chunks would not see one another's.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from text_tower import PackedTokens
from text_tower.packed import to_device
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
    with engine.backwards() as backward, engine.cast_once():
        first = []
        with torch.no_grad():
            for number, part in enumerate(parts):
                parts[number] = engine.upload(part)  # for both passes
                first.append(engine.forward(parts[number], **options))
        losses, gradients = _at_the_loss(first, losses_of, 0 if batch.images is None else len(batch.images), order)
        del first
        for number, part in enumerate(parts):
            embedded = engine.forward(part, **options)
            # A surrogate whose derivative is the chunk's part of the chain rule; what was dropped gets zeros.
            surrogate = (embedded.images * gradients.images[number]).sum()
            surrogate = surrogate + (embedded.texts * gradients.texts[number]).sum()
            if number == 0:  # temperatures and biases count once, whatever the number of chunks
                surrogate = surrogate + sum((embedded.scalars[name] * g).sum() for name, g in gradients.scalars.items())
            if surrogate.requires_grad:  # not if the chunk went through a frozen tower
                backward(surrogate, number == len(parts) - 1)
    return losses


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Of the losses: by the images and texts of each chunk, and by the scalars on which they depend."""

    images: tuple[Tensor, ...]
    texts: tuple[Tensor, ...]
    scalars: dict[str, Tensor]


def _at_the_loss(
    first: list[Embedded], losses_of: Callable[[Embedded], Losses], images: int, order: Tensor
) -> tuple[Losses, _Gradients]:
    """The losses, detached, over the embeddings of all chunks, and their gradients."""
    order = to_device(order, first[0].texts.device)
    whole = _whole(first, images, order)
    losses = losses_of(whole)
    of_images, of_texts, of_scalars = _gradients(total(losses), whole)
    return {name: (loss.detach(), stats) for name, (loss, stats) in losses.items()}, _Gradients(
        _split(of_images, [len(e.images) for e in first]),
        _split(of_texts[order], [len(e.texts) for e in first]),
        of_scalars,
    )


def total(losses: Losses) -> Tensor:
    """The sum of the losses."""
    return torch.stack([loss for loss, _ in losses.values()]).sum()


def _by_length(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with its texts sorted by length, and the position that each had before."""
    if not isinstance(batch.texts, PackedTokens):  # none, or embeddings
        return batch, torch.arange(0 if batch.texts is None else len(batch.texts), device="cpu")
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
