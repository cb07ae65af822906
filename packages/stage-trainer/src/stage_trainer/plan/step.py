"""Seconds of one training step on one rank, by part: the towers' traced passes, the loss, what ranks exchange, the
update.

Only copies of images overlap with what is computed: a step waits for those of its first chunk alone. The trainer
computes, reduces gradients and updates one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from stage_trainer.plan.devices import Device
from stage_trainer.plan.kernels import Kernel, Work
from stage_trainer.plan.memory import FLOAT, Model, Setting, Sizes, chunk_sizes, image_bytes, passes
from stage_trainer.plan.roofline import ATTENTION, LAUNCHES, MEMORY, PRODUCTS, work_seconds

LOSS, COMMUNICATION, OPTIMIZER, COPIES = "loss", "communication", "optimizer", "copies to the device"
PARTS = (PRODUCTS, ATTENTION, MEMORY, LAUNCHES, LOSS, COMMUNICATION, OPTIMIZER, COPIES)

HOST_LINK = 20e9  # bytes a second from the host's memory to a GPU: PCIe 4, 32 GB/s, less what it never reaches
OF_COSINES = 10  # operations on each cosine of a relational loss, forward and backward, each a kernel
MUON_STEPS = 5  # of Newton and Schulz's iteration (`optim.muon`)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by part, as far as it waits for each."""

    parts: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    @property
    def bound(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda part: part[1])[0]


def predict(model: Model, sizes: Sizes, setting: Setting, device: Device, link: float | None) -> Prediction | None:
    """A step of one rank.

    Args:
        model, sizes, setting: as for `memory.estimate`; texts of their mean length.
        device: what computes.
        link: bytes a second that ranks exchange, in NCCL's bus bandwidth; None: without counting that.

    Returns:
        None for a device of which too little is known.
    """
    if not device.timed:
        return None
    found = dict.fromkeys(PARTS, 0.0)
    for tower, attention in _towers(model, sizes, setting, device):
        seconds = work_seconds(tower, device)
        seconds[ATTENTION] *= attention
        for part, time in seconds.items():
            found[part] += time
    found[LOSS] = sum(work_seconds(_loss(model, sizes), device).values())
    found[OPTIMIZER] = sum(work_seconds(_update(model, setting.zero, sizes.ranks), device).values())
    if link and sizes.ranks > 1:
        sent = sum(exchanged(model, sizes, setting).values())
        found[COMMUNICATION] = sent * (sizes.ranks - 1) / sizes.ranks / link
    if device.kind != "cpu":
        found[COPIES] = image_bytes(model, chunk_sizes(sizes, setting)[0]) / HOST_LINK
    return Prediction(tuple(found.items()))


def _towers(model: Model, sizes: Sizes, setting: Setting, device: Device) -> Iterator[tuple[Work, float]]:
    """(what it runs in a step, by how much attention takes longer than for texts of one length) of each tower."""
    whole = sizes.images, sizes.texts
    chunks = chunk_sizes(sizes, setting)
    rests = whole[0] % max(1, chunks[0]), whole[1] % max(1, chunks[1])
    several = chunks[0] < whole[0], chunks[1] < whole[1]
    of_chunks = passes(model, sizes, setting, device, chunks, several)
    of_rests = passes(model, sizes, setting, device, rests, several)
    for i, factor in enumerate((1.0, sizes.squares)):
        # Made from numbers of twice as many bytes; in 8 bits one by one, by rows and by columns, eager.
        casts, passes_over = of_chunks[i].casts, 8 if model.fp8 else 3
        work: Work = Counter({Kernel("memory", passes_over * casts, casts): 1} if casts else {})
        for one, times in ((of_chunks[i], whole[i] // max(1, chunks[i])), (of_rests[i], 1)):
            for part in (one.first, one.there, one.back) if setting.cache else (one.there, one.back):
                work.update({kernel: often * times for kernel, often in part.items()})
        yield work, factor


def _loss(model: Model, sizes: Sizes) -> Work:
    """The logits forward and again backward, then the gradients of both sides; logits stay on the chip, but not the
    cosines that a relational loss compares."""
    work: Work = Counter()
    width = max(model.dims, default=model.text.output_width)
    for own, negatives in sizes.of_losses:
        rows, columns = own * sizes.ranks, own + negatives
        if own:
            moved, out = FLOAT * (rows + columns) * width, FLOAT * max(rows, columns) * width
            for shape in 2 * [(1, rows, columns, width)] + [(1, rows, width, columns), (1, columns, width, rows)]:
                operations = 2 * rows * columns * width
                work[Kernel("product", moved, 0 if shape[3] == width else out, operations, shape, model.precision)] += 1
    for own in sizes.related:  # our cosines and the teacher's, one gradient, and what is computed of each cosine
        rows, width = own * sizes.ranks, model.text.output_width
        read, cosines = FLOAT * (own + rows) * width, FLOAT * own * rows
        for shape in ((1, own, rows, width), (1, own, rows, width), (1, own, width, rows)):
            work[Kernel("product", read + cosines, cosines, 2 * own * rows * width, shape, "fp32")] += 1
        work[Kernel("memory", 2 * cosines, cosines)] += OF_COSINES
    return work


def exchanged(model: Model, sizes: Sizes, setting: Setting) -> dict[str, int]:
    """Bytes that a collective of each kind moves in a step, one that reduces to all as twice as many: a rank sends
    (ranks - 1) / ranks of them."""
    own = sum(pairs for pairs, _ in sizes.of_losses) + sum(sizes.related)
    moved = {
        "embeddings and their gradients": 2 * FLOAT * own * sizes.ranks * model.text.output_width,
        # Reduced to all, or under ZeRO to the rank that updates them, which then sends the weights.
        "gradients and weights": 2 * FLOAT * model.learning,
    }
    if setting.zero == 3:  # weights are whole only while a module uses them: forward, backward, and what is repeated
        whole = zip((sizes.images, sizes.texts), chunk_sizes(sizes, setting), strict=True)
        most = max(-(-all_of // chunk) for all_of, chunk in whole if chunk)
        moved["weights of ZeRO 3"] = FLOAT * model.weights * most * (3 if setting.cache else 2)
    return moved


def _update(model: Model, zero: int, ranks: int) -> Work:
    """Norm and clipping (three passes over the gradients), ZeRO's copies of them, and the update: AdamW reads weight,
    gradient and both moments, and writes all but the gradient."""
    updated = -(-model.learning // ranks) if zero else model.learning
    moved = 10 * FLOAT * updated + (4 * FLOAT * model.learning if zero else 0)
    work: Work = Counter({Kernel("memory", moved): 1})
    if model.optimizer == "muon":  # ranks share the matrices
        for out, into in model.muon_shapes:
            small, large = min(out, into), max(out, into)
            for m, n, k in ((small, small, large), (small, small, small), (small, large, small)):
                size = 2 * (m * k + k * n + m * n)
                kernel = Kernel("product", size, 2 * m * n, 2 * m * n * k, (1, m, n, k), model.precision)
                work[kernel] += MUON_STEPS / ranks  # type: ignore[assignment]
    return work
