"""Memory of one rank over a training step, by part, at the moments that may need most.

The towers' activations are traced (`trace`); everything else is counted: weights, gradients and optimizer state as
DeepSpeed keeps them under each ZeRO stage, the loss's buffers, stored embeddings, the batch.

Gradients stay whole on every rank until the last backward pass, under ZeRO 2 and 3 too: the trainer reduces them over
ranks once a step (`Engine.backwards`). So ZeRO 2 saves nothing beyond ZeRO 1 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from text_tower import TextTowerConfig
from vision_tower import VisionTowerConfig
from vision_tower.config import as_pair

from stage_trainer.plan.devices import Device
from stage_trainer.plan.target import Target
from stage_trainer.plan.trace import Pass, trace_images, trace_texts
from stage_trainer.recipe import GradientCache, Trainable

PARTS = (
    "weights", "optimizer state", "gradients", "activations", "embeddings", "batch", "loss", "reduction and update"
)  # fmt: skip
Parts = dict[str, int]

FLOAT = 4
BUCKET = 500_000_000  # elements that DeepSpeed reduces at once, unless the recipe says otherwise
LIVE_WEIGHTS = 1_000_000_000  # elements that ZeRO 3 lets be whole at a time, likewise
TILE = {"cpu": (512, 512), "cuda": (2048, 4096)}  # of the loss's logits (contrastive_losses.torch_tiles)
COMPILED = 0.7  # share of the image tower's activations that Inductor keeps, on an H200; of the text tower's all
DERIVATIVES = 512 * 2**20  # of the loss on CUDA (contrastive_losses.triton_tiles)


@dataclass(frozen=True)
class Sizes:
    """What one rank has to do in a step: `images` (with views or hard negatives, if there are any), `texts` (captions,
    and of each text pair both sides and its hard negatives) of `length` tokens on average, over `ranks` ranks.

    `pairs` text pairs with `negatives` hard negatives each are among the texts; `unified` is what a unified loss has
    for pairs, 0 for a loss for each task. `squares` is the mean of the lengths' squares over the square of their mean.
    Each caption has `image_negatives` hard-negative images, which are among the images. Tasks of which a teacher's loss
    `replaced` the contrastive one have none; `taught` are the embeddings of a rank that each loss of the teacher reads,
    and, if it is `relational`, compares with those of all ranks.
    """

    images: int
    texts: int
    length: int
    pairs: int
    negatives: int
    ranks: int
    unified: int = 0
    squares: float = 1.0
    image_negatives: int = 0
    replaced: tuple[str, ...] = ()
    taught: tuple[int, ...] = ()
    relational: bool = False

    @property
    def captions(self) -> int:
        """Images that are a caption's own; with views, these too."""
        return self.images // (1 + self.image_negatives)

    @property
    def of_losses(self) -> tuple[tuple[int, int], ...]:
        """(pairs, hard negatives) of each contrastive loss."""
        if self.unified:
            return ((self.unified, 0),)
        of_tasks = {
            "image_text": (self.captions, self.captions * self.image_negatives),
            "text": (self.pairs, self.pairs * self.negatives),
        }
        return tuple(each for task, each in of_tasks.items() if task not in self.replaced)

    @property
    def related(self) -> tuple[int, ...]:
        """`taught`, where each is compared with those of all ranks."""
        return self.taught if self.relational else ()

    @property
    def tokens(self) -> int:
        return self.texts * self.length


@dataclass(frozen=True)
class Setting:
    """How a step is run: all that trades time for memory."""

    cache: GradientCache | None = None
    checkpointing_image: bool = False
    checkpointing_text: bool = False
    zero: int = 0


@dataclass(frozen=True)
class Model:
    """What is trained, and how: towers at one resolution, what of them learns, precision, optimizer, dims."""

    text: TextTowerConfig
    vision: VisionTowerConfig
    trainable: Trainable
    patch_dropout: float
    precision: str
    optimizer: str
    dims: tuple[int, ...]
    weights: int  # numbers in all
    learning: int  # numbers that are trained
    largest: int  # numbers of the largest weight that is trained
    matrices: int  # numbers that Muon trains, with half of AdamW's state
    deepspeed: tuple[tuple[str, int], ...] = ()  # zero_optimization's sizes, where the recipe gives them
    muon_shapes: tuple[tuple[int, int], ...] = ()  # of those matrices
    exchange: Literal["auto", "gather", "ring"] = "auto"  # of the losses
    stored: tuple[str, ...] = ()  # towers whose embeddings come from the disk
    fp8: bool = False  # blocks multiply in 8 bits


@dataclass(frozen=True)
class Estimate:
    """Bytes by part at the moment that needs most, and which moment that is."""

    parts: Parts
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(model: Model, sizes: Sizes, setting: Setting, device: Device) -> Estimate:
    """The peak of a step on one rank, all that the allocator hands out; not what CUDA and NCCL take for themselves."""
    resting = resting_parts(model, setting.zero, sizes.ranks)
    moments = (_cached if setting.cache else _whole)(model, sizes, setting, device)
    moments["update of the weights"] = update_parts(model, setting.zero, sizes.ranks, device)
    found = [Estimate(_added(resting, parts), name) for name, parts in moments.items()]
    return max(found, key=lambda each: each.total)


def resting_parts(model: Model, zero: int, ranks: int) -> Parts:
    """What is there throughout. ZeRO keeps a copy of what it updates, in float32 as the weights are already."""
    share = math.ceil(model.learning / ranks)
    state = 2 * model.learning - (model.matrices if model.optimizer == "muon" else 0)
    if not zero:
        return {"weights": FLOAT * model.weights, "optimizer state": FLOAT * state}
    weights = model.weights
    if zero == 3:  # the parts, and as many whole ones at a time as DeepSpeed lets live; gradients' parts stay, too
        whole = min(model.weights, dict(model.deepspeed).get("stage3_max_live_parameters", LIVE_WEIGHTS))
        weights = math.ceil(model.weights / ranks) + (whole if ranks > 1 else 0)
    return {
        "weights": FLOAT * (weights + share),
        "optimizer state": FLOAT * 2 * share,
        "gradients": FLOAT * share if zero == 3 else 0,
    }


def update_parts(model: Model, zero: int, ranks: int, device: Device) -> Parts:
    """After the last backward pass: whole gradients, DeepSpeed's bucket of them on their way over the ranks, then
    the optimizer's own temporaries."""
    gradients, share = FLOAT * model.learning, FLOAT * math.ceil(model.learning / ranks)
    bucket = FLOAT * dict(model.deepspeed).get("reduce_bucket_size", BUCKET)
    # ZeRO makes its bucket whole, and copies out of it what was averaged.
    of_zero = bucket + (share if zero < 3 else 0)
    reducing = of_zero if zero else min(gradients, bucket) if ranks > 1 else 0
    # torch's AdamW takes all weights of a group at once on a GPU, with a temporary as large; on a CPU one by one.
    updating = share if zero or device.kind == "cuda" else 2 * FLOAT * model.largest
    if zero:  # by then a rank has the gradients of its own part alone
        return {"gradients": gradients, "reduction and update": max(reducing, 2 * share + updating - gradients)}
    return {"gradients": gradients, "reduction and update": max(reducing, updating)}


def _whole(model: Model, sizes: Sizes, setting: Setting, device: Device) -> dict[str, Parts]:
    """Without caching: images forward, texts forward, loss, texts backward, images backward."""
    image, text = passes(model, sizes, setting, device, (sizes.images, sizes.texts), (False, False))
    fixed = {"batch": image_bytes(model, sizes.images) + _token_bytes(sizes.tokens)}
    fixed["weights"] = image.casts + text.casts  # none unless blocks multiply in 8 bits
    embeddings = {"embeddings": 2 * _embedding_bytes(model, sizes)}  # with their gradients
    saved, working = loss_bytes(model, sizes, device)
    moments = {
        "images, forward": _added(fixed, {"activations": image.forward}),
        "texts, forward": _added(fixed, {"activations": image.held + text.forward}),
        "loss": _added(fixed, embeddings, {"activations": image.held + text.held, "loss": saved + working}),
    }
    for everything, gradients in text.backward:
        parts = {"activations": image.held + everything - gradients, "gradients": gradients}
        moments[f"texts, backward {len(moments)}"] = _added(fixed, embeddings, parts)
    for everything, gradients in image.backward:
        parts = {"activations": everything - gradients, "gradients": text.gradients + gradients}
        moments[f"images, backward {len(moments)}"] = _added(fixed, embeddings, parts)
    return moments


def _cached(model: Model, sizes: Sizes, setting: Setting, device: Device) -> dict[str, Parts]:
    """With caching: every chunk forward, the loss, every chunk forward and backward."""
    images, texts = chunk_sizes(sizes, setting)
    # A second chunk finds gradients, and adds to them.
    several = images < sizes.images, texts < sizes.texts
    image, text = passes(model, sizes, setting, device, (images, texts), several)
    casts = {"weights": image.casts + text.casts}
    stored = _embedding_bytes(model, sizes)
    saved, working = loss_bytes(model, sizes, device)
    batch = {"batch": image_bytes(model, sizes.images) + _token_bytes(sizes.tokens)}  # uploaded once for both passes
    # Chunks' embeddings, these in one tensor, their gradients.
    moments = {"loss": _added(batch, casts, {"embeddings": 3 * stored, "loss": saved + working})}
    for name, tower, extra in (("images", image, 0), ("texts", text, image.gradients)):
        there = tower.gradients if several[name == "texts"] else 0
        for everything, gradients in tower.backward:
            parts = {"activations": everything - gradients, "gradients": extra + there + gradients}
            moments[f"{name}, backward {len(moments)}"] = _added(batch, casts, {"embeddings": 2 * stored}, parts)
        if not tower.backward:
            parts = {"activations": tower.forward, "gradients": extra}
            moments[f"{name}, forward"] = _added(batch, casts, {"embeddings": 2 * stored}, parts)
    return moments


def chunk_sizes(sizes: Sizes, setting: Setting) -> tuple[int, int]:
    """Images and texts of one forward pass."""
    images = texts = 0
    if setting.cache:
        images, texts = setting.cache.images, setting.cache.tokens and max(1, setting.cache.tokens // sizes.length)
    return min(images or sizes.images, sizes.images), min(texts or sizes.texts, sizes.texts)


def passes(
    model: Model, sizes: Sizes, setting: Setting, device: Device, chunk: tuple[int, int], again: tuple[bool, bool]
) -> tuple[Pass, Pass]:
    """Of so many images and of so many texts, with gradients there already or not."""
    (images, texts), nothing = chunk, Pass(0, 0, (), 0)
    vision = replace(model.vision, checkpointing=setting.checkpointing_image)
    text = replace(model.text, checkpointing=setting.checkpointing_text)
    target, trainable = Target.of(device, model.precision, model.fp8), model.trainable
    cast = target.bf16 and (setting.cache is not None or model.fp8) and setting.zero < 3
    image = (
        trace_images(vision, images, model.patch_dropout, target, trainable.image, again[0], cast)
        if images and "image" not in model.stored
        else nothing
    )
    if vision.compile and not vision.checkpointing and device.kind == "cuda":
        image = image.keeping(COMPILED)
    if not texts or "text" in model.stored:
        return image, nothing
    return image, trace_texts(text, texts, sizes.length, target, trainable.text, again[1], cast)


def loss_bytes(model: Model, sizes: Sizes, device: Device) -> tuple[int, int]:
    """(kept from forward to backward, working space) of the losses; the logits are never there as a whole, but the
    cosines that a relational loss compares (`tasks.distill.teacher_loss`).

    Each rank has the queries of all ranks, gathered, and their gradient; in a ring (`contrastive_losses.ring`) three
    blocks of a rank's queries and four of their gradients. Vectors are float64, one number for each prefix and row.
    """
    from contrastive_losses.fused import goes_round

    prefixes, width = len(model.dims), model.text.output_width
    kept, most = 0, 0
    for own, negatives in sizes.of_losses:
        if not own:
            continue
        everyone = own * sizes.ranks
        number = (2 if model.precision == "bf16" else FLOAT) + FLOAT
        blocks = (3, 4) if goes_round(model.exchange, sizes.ranks, everyone, width, number) else (1, 1)
        everyone = own if blocks > (1, 1) else everyone
        gathered = FLOAT * blocks[0] * everyone * width if sizes.ranks > 1 else 0
        vectors = 8 * prefixes * (4 * everyone + 3 * own + negatives)
        height, columns = (min(a, b) for a, b in zip(TILE[device.kind], (everyone, max(own, negatives)), strict=True))
        tiles = FLOAT * (prefixes + 4) * height * columns
        if device.kind == "cuda" and device.capability >= (8, 0):
            tiles = min(DERIVATIVES, FLOAT * prefixes * everyone * max(own, negatives))
        gradients = FLOAT * width * (blocks[1] * everyone + own + negatives)
        kept += gathered + vectors
        most = max(most, gradients + tiles + 2 * vectors)
    for own in sizes.taught:
        read = FLOAT * own * width
        cosines = FLOAT * own * own * sizes.ranks if sizes.relational else 0
        kept += cosines + 2 * read * (sizes.ranks if sizes.relational else 1)  # ours and what they are compared with
        most = max(most, 3 * (cosines or read))
    return kept, most


def _embedding_bytes(model: Model, sizes: Sizes) -> int:
    return FLOAT * model.text.output_width * (sizes.images + sizes.texts)


def image_bytes(model: Model, images: int) -> int:
    """uint8 pixels, or float32 embeddings from the disk, and a seed for each."""
    if "image" in model.stored:
        return images * (FLOAT * model.vision.width + 8)
    height, width = as_pair(model.vision.resolution)
    return images * (3 * height * width + 8)


def _token_bytes(tokens: int) -> int:
    return 8 * tokens


def _added(*many: Parts) -> Parts:
    return {name: sum(parts.get(name, 0) for parts in many) for name in PARTS}
