"""Floating-point operations of a training step: matrix products, counted from shapes alone.

A product of `[m, k]` and `[k, n]` is 2·m·k·n operations; everything else is left out, as is the custom (PaLM,
arXiv 2204.02311, appendix B; torch.utils.flop_counter). Attention counts with the squares of the sequence lengths.
Backward, a product costs once more for the gradient of its input and once more for that of its weight, where these are
wanted. Work that is done a second time to save memory stands apart: model FLOPs utilisation leaves it out. The scores
that a fused attention kernel computes again in its backward pass count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

from text_tower import PackedTokens, TextTowerConfig
from text_tower.masked_lm import MAX_LOGITS
from vision_tower import VisionTowerConfig

from stage_trainer.batch import Batch
from stage_trainer.recipe import Trainable


@dataclass(frozen=True)
class Flops:
    """Operations of a step, over all ranks: forward and backward are the model's, `recomputed` what saving memory
    adds (activation checkpointing, the first pass of gradient caching, the loss's logits)."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    @property
    def model(self) -> int:
        """What MFU counts."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """What the hardware computes."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step's batch. Up to `unified` all but `kept_patches` and `negatives` add up over ranks.

    Attributes:
        images: I, each with its caption, or views or hard negatives of these too.
        kept_patches: patches of an image that patch dropout leaves.
        texts, tokens, squared_tokens: how many texts, the sum of their lengths, the sum of the squares of these.
        pairs: P, text pairs.
        negatives: K, hard negatives of each text pair.
        unified: pairs of a unified loss; 0 for a loss for each task.
        stored: the towers ("image", "text") that do not run, since their embeddings come from the disk
            (`embedding_cache`).
        image_negatives: hard-negative images of each caption.
        replaced: tasks ("image_text", "text") whose contrastive loss a teacher's replaces.
        related: how many embeddings of the global batch each relational loss compares with one another.
    """

    images: int = 0
    kept_patches: int = 0
    texts: int = 0
    tokens: int = 0
    squared_tokens: int = 0
    pairs: int = 0
    negatives: int = 0
    unified: int = 0
    stored: tuple[str, ...] = ()
    image_negatives: int = 0
    replaced: tuple[str, ...] = ()
    related: tuple[int, ...] = ()

    def __add__(self, other: StepShape) -> StepShape:
        """Of two ranks' parts the whole."""
        alike = ("kept_patches", "negatives", "stored", "image_negatives", "replaced", "related")
        shared = {name: max(getattr(self, name), getattr(other, name)) for name in alike}
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name not in shared}
        return StepShape(**sums, **shared)

    @classmethod
    def of(cls, batch: Batch, vision: VisionTowerConfig, patch_dropout: float = 0.0) -> StepShape:
        """That of one rank's batch, by its shapes alone."""
        images = 0 if batch.images is None else len(batch.images)
        lengths = batch.texts.lengths if isinstance(batch.texts, PackedTokens) else ()
        return cls(
            images=images,
            kept_patches=kept_patches(vision, patch_dropout) if images else 0,
            texts=len(lengths),
            tokens=sum(lengths),
            squared_tokens=sum(n * n for n in lengths),
            pairs=batch.pairs,
            negatives=batch.negatives,
            image_negatives=batch.image_negatives,
        )


def kept_patches(vision: VisionTowerConfig, patch_dropout: float) -> int:
    """Patches of an image that remain (`vision_tower.patch_keep_indices`)."""
    return max(1, round((1 - patch_dropout) * vision.num_patches))


def step_flops(
    text: TextTowerConfig,
    vision: VisionTowerConfig,
    shape: StepShape,
    *,
    trainable: Trainable | None = None,
    dims: tuple[int, ...] = (),
    cached: bool = False,
) -> Flops:
    """A contrastive step over the global batch. Arithmetic only: cheap enough for every step.

    Args:
        text, vision: the towers, `checkpointing` included.
        shape: of the global batch, over all ranks.
        trainable: what has gradients (None: everything).
        dims: Matryoshka prefixes of the loss; one product of the widest serves all of them.
        cached: whether gradients are cached, which embeds everything twice.
    """
    trainable = trainable or Trainable()
    if "text" in shape.stored:
        towers = projector_flops(text, shape.texts, trainable.text)
    else:
        towers = text_flops(text, shape, trainable.text)
    if "image" in shape.stored:
        towers += projector_flops(vision, shape.images, trainable.image)
    elif shape.images:
        towers += vision_flops(vision, shape, trainable.image)
    if cached:
        towers += Flops(recomputed=towers.forward)
    learns = (trainable.image, trainable.text) != ("none", "none")
    return towers + loss_flops(shape, max(dims, default=text.output_width), text.output_width, learns)


def masked_lm_flops(text: TextTowerConfig, shape: StepShape, hidden: int) -> Flops:
    """A step of masked-language-model training over the global batch, of which `hidden` tokens are to be told."""
    dense, table = 2 * hidden * text.width**2, 2 * hidden * text.width * text.vocab_size
    chunked = hidden > max(1, MAX_LOGITS // text.vocab_size)  # then the backward pass makes the logits again
    return text_flops(text, shape) + Flops(dense + table, 2 * (dense + table), table if chunked else 0)


def text_flops(config: TextTowerConfig, shape: StepShape, trainable: str = "all") -> Flops:
    """The text tower over packed tokens: no padding is computed, so none is counted."""
    width, rank = config.width, config.lora_rank
    hidden = config.mlp_matrices * config.mlp_width
    matrices = 4 * width**2 + width * hidden
    weights = 2 * shape.tokens * matrices
    # An adapter is added to the weights in one product (counted once for all chunks), or costs each token two thin ones
    # (`text_tower.lora.AdaptedLinear.forms_sum`).
    formed = trainable != "adapters" and shape.tokens > width
    adapters = 2 * rank * (matrices if formed else shape.tokens * (8 * width + hidden))
    attention = 4 * shape.squared_tokens * width
    block = weights + adapters + attention
    # Adapters of the tables: [T, rank] rows of the words, one of the token type, times [rank, width].
    table = 2 * (shape.tokens + 1) * rank * width if shape.texts else 0
    forward, projector = config.layers * block + table, projector_flops(config, shape.texts, trainable)
    if trainable in ("none", "projector"):
        return Flops(forward) + projector
    # Gradients of inputs go down to the tables; those of weights are for weights that learn.
    backward = config.layers * ((2 if trainable == "all" else 1) * weights + 2 * adapters + 2 * attention) + 2 * table
    return Flops(forward, backward, config.layers * block if config.checkpointing else 0) + projector


def vision_flops(config: VisionTowerConfig, shape: StepShape, trainable: str = "all") -> Flops:
    """The vision tower over the patches that patch dropout leaves; its last block computes the class token alone."""
    width, hidden, patches = config.width, config.mlp_width, shape.kept_patches
    tokens = patches + 1

    def block(queries: int) -> int:
        """An image in a block that `queries` of its tokens leave."""
        return 2 * (2 * queries * width**2 + 2 * tokens * width**2 + 2 * queries * tokens * width) + mlp(queries)

    def mlp(queries: int) -> int:
        return 2 * queries * 3 * width * hidden

    blocks = (config.layers - 1) * block(tokens) + block(1)
    patch_projection = 2 * patches * 3 * config.patch**2 * width
    forward = shape.images * (blocks + patch_projection)
    # The adapter: two thin products for each token beside each of a block's matrices.
    halves = 4 * width, 4 * width + 3 * (width + hidden)  # keys and values; queries, projection and MLP
    columns = (config.layers - 1) * tokens * sum(halves) + tokens * halves[0] + halves[1]
    adapters = 2 * shape.images * config.lora_rank * columns
    forward += adapters
    projector = projector_flops(config, shape.images, trainable)
    if trainable in ("none", "projector"):
        return Flops(forward) + projector
    # Pixels have no gradient. A block is recomputed up to its last saved input, that of the MLP's last product.
    backward = shape.images * (2 * blocks + patch_projection) + 2 * adapters
    if trainable == "adapters":  # gradients of inputs and of attention, none of weights, nor of the first block's input
        weights = (config.layers - 1) * (8 * tokens * width**2 + mlp(tokens)) + 4 * (tokens + 1) * width**2 + mlp(1)
        first = 6 * tokens * (width**2 + config.lora_rank * width)
        backward -= shape.images * (weights + first + patch_projection)
    last = (config.layers - 1) * mlp(tokens) // 3 + mlp(1) // 3
    recomputed = shape.images * (blocks - last) + adapters if config.checkpointing else 0
    return Flops(forward, backward, recomputed) + projector


def projector_flops(config: TextTowerConfig | VisionTowerConfig, rows: int, trainable: str) -> Flops:
    """The projector over so many embeddings, which need no gradient where it learns alone."""
    if not config.projector:
        return Flops()
    sides = [config.width, *([config.projector_hidden] if config.projector_hidden else []), config.projector]
    products = [2 * rows * inputs * outputs for inputs, outputs in pairwise(sides)]
    backward = {"none": 0, "projector": 2 * sum(products) - products[0]}
    return Flops(sum(products), backward.get(trainable, 2 * sum(products)))


def loss_flops(shape: StepShape, dim: int, width: int, learns: bool = True) -> Flops:
    """The contrastive losses, of prefixes `dim`: each query of the global batch against each target and hard negative.
    The relational ones: our cosines and a teacher's, taken to be as wide, `width`, and the gradient of ours."""
    captions = shape.images // (1 + shape.image_negatives)
    of_tasks = {"image_text": captions * shape.images, "text": shape.pairs**2 * (1 + shape.negatives)}
    logits = shape.unified**2 or sum(count for task, count in of_tasks.items() if task not in shape.replaced)
    forward, cosines = 2 * logits * dim, 2 * sum(count**2 for count in shape.related) * width
    if not learns:
        return Flops(forward + 2 * cosines)
    return Flops(forward + 2 * cosines, 2 * forward + cosines, forward)
