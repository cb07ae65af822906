"""A recipe: model, data and the list of stages, in one YAML file.

The classes below are the whole schema. A value that the paper does not give is tagged `!ours` in the file
(`warmup_steps: !ours 2000`); in a recipe with `paper:` everything without that tag is the paper's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic.dataclasses import dataclass

from stage_trainer.errors import UserError
from stage_trainer.recipe.kinds import Kind, kind_of
from stage_trainer.recipe.limits import MAX_PIXELS, LimitsConfig
from stage_trainer.recipe.loss import LossConfig
from stage_trainer.recipe.remote import RemoteConfig
from stage_trainer.recipe.sources import StageData
from stage_trainer.recipe.teacher import TeacherConfig
from stage_trainer.recipe.values import STRICT, Float, Int

_T = TypeVar("_T")


@dataclass(frozen=True, config=STRICT)
class PerTask:
    """One number for each task: the step from which it takes part, or the global batch size."""

    image_text: Int = 0
    text: Int = 0


@dataclass(frozen=True, config=STRICT)
class BatchSizes(PerTask):
    """Global batch sizes, in pairs; in a stage of masked-language-model training only `masked_lm`, in texts."""

    masked_lm: Int = 0


@dataclass(frozen=True, config=STRICT)
class PerTower:
    """One number for each tower."""

    image: Float = 1.0
    text: Float = 1.0


@dataclass(frozen=True, config=STRICT)
class Rates:
    """Peak learning rates. The image tower and the temperature of the image-text loss train at `image`, the text tower
    and the temperature of the text loss at `text`. May be left out (None) only if nothing trains at it."""

    image: Float | None = None
    text: Float | None = None


@dataclass(frozen=True, config=STRICT)
class Trainable:
    """Which parameters of each tower train: `all`, `none`, only the LoRA `adapters`, with which a projector trains, or
    the `projector` alone."""

    image: Literal["all", "adapters", "projector", "none"] = "all"
    text: Literal["all", "adapters", "projector", "none"] = "all"


@dataclass(frozen=True, config=STRICT)
class MaskingConfig:
    """Masked-language-model training: the `share` of words that are masked; languages are drawn in proportion to their
    number of texts to the power of `language_exponent` (both as in XLM-R, arXiv 1911.02116)."""

    share: Float = 0.15
    language_exponent: Float = 0.3


@dataclass(frozen=True, config=STRICT)
class AugmentationConfig:
    """Random resized crops of training images: share of the area kept, aspect ratios, flips, colour jitter.

    With `views` an image has so many fixed views, of which each draw takes one, instead of a new one each time: the
    first is the image as in inference, the others are augmented once. 1 is no augmentation."""

    scale: tuple[Float, Float] = (0.9, 1.0)
    ratio: tuple[Float, Float] = (0.75, 1.3333)
    flip: bool = False
    color: Float = 0.0
    views: Int = 0


@dataclass(frozen=True, config=STRICT)
class GradientCache:
    """Chunks of a rank's part of a batch, for gradient caching: images and text tokens in one forward pass (0: all).
    Masked-language-model training needs no cache: its chunks' gradients are added up. `auto` instead of sizes chooses
    them, or no chunks, by the memory that is free when the run starts (`plan.auto`)."""

    images: Int = 0
    tokens: Int = 0


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One stage. `resolution` and `patch_dropout` are lists of [from_step, value]. It starts from the previous stage's
    model, and with `carry_optimizer` also from its optimizer's moments, by parameter name.

    `embedding_cache` is a folder for the embeddings of a tower that does not train (its projector may):
    all of the data's texts, or each image's fixed views (`augmentation.views`), go through it once, when the stage
    starts or by `stage-trainer embed`, and then no more.

    With `fp8` the blocks of both towers multiply in 8 bits, on a GPU of compute capability 8.9 or later
    (`engine.float8`): in every pass of a step, since both passes of gradient caching have to be the same function.
    `emulate` computes the same on a CPU, slowly. Validation, and what a checkpoint holds, stay as they are.

    A stage with `batch.masked_lm` trains only the text tower, to predict masked words. Fields for images, pairs or
    embeddings do not apply to it, and it needs no `resolution` and no `loss`."""

    steps: Int
    max_tokens: Int
    batch: BatchSizes
    lr: Rates
    data: StageData
    resolution: tuple[tuple[Int, Int], ...] = ()
    loss: LossConfig = field(default_factory=LossConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    layer_decay: PerTower = field(default_factory=PerTower)
    warmup_steps: Int = 0
    min_lr_ratio: Float = 0.0
    patch_dropout: tuple[tuple[Int, Float], ...] = ((0, 0.0),)
    task_start: PerTask = field(default_factory=PerTask)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    trainable: Trainable = field(default_factory=Trainable)
    embedding_cache: str | None = None
    teacher: TeacherConfig | None = None
    carry_optimizer: bool = False
    gradient_cache: GradientCache | Literal["auto"] | None = None
    fp8: bool | Literal["emulate"] = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What tells it from stages of other kinds, outside of its task."""
        return kind_of(lambda name: getattr(self.batch, name))

    @property
    def task(self) -> str:
        """The name of what the stage does (`tasks.TASKS`)."""
        return self.teacher.task if self.teacher else self.kind.task

    @property
    def unplanned(self) -> str:
        """Why `stage-trainer plan` leaves the stage out; "" if it does not."""
        return self.kind.unplanned

    def batch_at(self, step: int) -> dict[str, int]:
        """The global batch of a step: {kind: how many}, each kind from its `task_start` on."""
        return {k: size for k, size in asdict(self.batch).items() if size and step >= getattr(self.task_start, k, 0)}

    def only_embeds(self, task: str) -> bool:
        """Whether a teacher's loss alone reads the embeddings of a task ("image_text", "text")."""
        return self.teacher is not None and self.teacher.only_embeds(task)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The tasks whose contrastive loss a teacher's replaces."""
        return tuple(task for task in ("image_text", "text") if self.teacher and self.teacher.replaces(task))

    def taught(self, images: int, captions: int, pairs: int, negatives: int) -> tuple[int, ...]:
        """How many embeddings each loss of the teacher reads, of so many that any loss reads."""
        return self.teacher.taught(images, captions, pairs, negatives) if self.teacher else ()

    @property
    def relational(self) -> bool:
        """Whether the teacher's losses compare each embedding with each."""
        return self.teacher is not None and self.teacher.loss == "relational"

    @property
    def unread(self) -> tuple[str, ...]:
        """What no loss reads of image-text pairs ("images", "captions")."""
        if self.teacher is None or not self.teacher.replaces("image_text"):
            return ()
        return tuple(what for what in ("images", "captions") if what not in self.teacher.of)

    def reads(self, what: str) -> bool:
        """Whether a loss reads the "images" or "captions" of image-text pairs, or the "texts" of text pairs."""
        return bool(self.batch.text if what == "texts" else self.batch.image_text and what not in self.unread)

    def counts(self, tasks: Collection[str]) -> tuple[int, int, int]:
        """How many images, captions and text pairs a global batch of these tasks has that a loss reads."""
        captioned, pairs = (getattr(self.batch, task) if task in tasks else 0 for task in ("image_text", "text"))
        return captioned * self.reads("images"), captioned * self.reads("captions"), pairs

    @property
    def stored(self) -> tuple[str, ...]:
        """The towers ("image", "text") whose embeddings come from the disk."""
        still = ("none", "projector")
        images = self.reads("images") and self.trainable.image in still
        texts = (self.reads("captions") or self.reads("texts")) and self.trainable.text in still
        frozen = {"image": images, "text": texts}
        return tuple(name for name, is_frozen in frozen.items() if is_frozen and self.embedding_cache is not None)

    @property
    def chunks(self) -> GradientCache | None:
        """The sizes of `gradient_cache`; None for none, and for an `auto` that has not been resolved yet."""
        return self.gradient_cache if isinstance(self.gradient_cache, GradientCache) else None

    def resolution_at(self, step: int) -> int:
        return at_step(self.resolution, step)

    def patch_dropout_at(self, step: int) -> float:
        return at_step(self.patch_dropout, step)


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """`adamw` as in the paper, or `muon`: Muon on the weight matrices of the blocks, AdamW on everything else.

    Muon's rate is the stage's rate times `muon_lr_scale`, that of the word embeddings times `embedding_lr_scale`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Float, Float] = (0.9, 0.98)
    eps: Float = 1e-6
    weight_decay: Float = 0.02
    gradient_clipping: Float = 1.0
    embedding_lr_scale: Float = 1.0
    muon_lr_scale: Float = 20.0
    muon_momentum: Float = 0.95


NEW_TEMPERATURE = 0.07
"""CLIP's (arXiv 2103.00020)."""


@dataclass(frozen=True, config=STRICT)
class Override:
    """What replaces the weights' own values: fields of a tower, and the initial value of both temperatures."""

    text: dict[str, object] = field(default_factory=dict)
    vision: dict[str, object] = field(default_factory=dict)
    temperature: Float | None = None


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Fields of `TextTowerConfig` and `VisionTowerConfig`; weights to start from; the tokenizer's file.

    A recipe whose stages are all masked-language-model training needs no `vision`. `weights` is a whole model: a
    directory that `export` wrote or a checkpoint's `model/`, or one of jina-clip-v2; `text_weights` and
    `vision_weights` are single towers, directories or hub names that their `from_pretrained` (or timm) reads, and take
    precedence. Without any of them the towers start from random weights.

    Weights bring what belongs to them: shapes, rotary base, epsilons, adapters with their rank and alpha, instructions,
    and a whole model's temperatures and, if `tokenizer` is left out, its tokenizer. `text` and `vision` need not state
    these, and may state other values only under `override`. Dropout, lengths, checkpointing, attention and compilation
    are the recipe's (`max_length`, if it is left out, the weights').

    `vision.lora_rank` (with `vision.lora_alpha`) gives the image tower one adapter, `text.lora_rank` with
    `text.adapters` the text tower one for each name; `vision.projector` and `text.projector` a projector to that width.

    `temperature` is the initial value of both temperatures of a new model (None: `NEW_TEMPERATURE`).
    """

    text: dict[str, object] = field(default_factory=dict)
    tokenizer: str | None = None
    vision: dict[str, object] | None = None
    weights: str | None = None
    text_weights: str | None = None
    vision_weights: str | None = None
    temperature: Float | None = None
    override: Override = field(default_factory=Override)


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """Validation every `every` steps (0: never): recall@5 on data sets of captioned images (also nDCG@5 on pages that
    answer queries), nDCG@10 on text pairs, Spearman's correlation where these have a "score". A stage of
    masked-language-model training measures its loss on the validation split of its own data instead."""

    every: Int = 0
    pools: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """A checkpoint every `every` steps (0: only at the end and at a change of resolution); the newest `keep` stay.

    `best` names a validation metric by its TensorBoard tag ("validation_recall_at_5_emoji/text to image"): whenever it
    improves, a checkpoint is written, and the best one is kept as well.
    """

    every: Int = 0
    keep: Int = 2
    best: str | None = None


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole training, from the start to the last stage.

    `precision` is that of the towers' computation; `auto` is bf16 if the machine multiplies in bfloat16, and else fp32,
    since emulated bf16 is up to ten times slower. `device: auto` is a GPU; bf16 without one is refused, unless it is
    `cpu`. Up to the share `max_corrupt` of the samples drawn may be unreadable or unusable, an image of more than
    `max_pixels` among them (refused in held-out data); they are replaced and entered in `corrupt.jsonl`. A step with a
    gradient that is not finite is skipped; `max_skipped` in a row end the run. `sinks` get the scalars beside
    TensorBoard ("module:callable", see `stage_trainer.run.monitor.Sink`). Each process keeps `cache_megabytes` of
    decoded samples in main memory. `limits`: how long each part of a run may take.
    """

    name: str
    output: str
    corpus: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    paper: str | None = None
    seed: Int = 0
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    device: Literal["auto", "cpu"] = "auto"
    workers: Int = 0
    cache_megabytes: Int = 0
    max_pixels: Int = MAX_PIXELS
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    max_corrupt: Float = 0.01
    max_skipped: Int = 5
    log_every: Int = 10
    sinks: tuple[str, ...] = ()
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def stage(self, number: int) -> Stage:
        """The stage of that number, counted from 1."""
        if not 1 <= number <= len(self.stages):
            raise UserError(f"recipe {self.name!r} has stages 1 to {len(self.stages)}; stage {number} was asked for")
        return self.stages[number - 1]

    def stage_directory(self, number: int) -> Path:
        return Path(self.output) / f"stage{number}"


def at_step(schedule: tuple[tuple[int, _T], ...], step: int) -> _T:
    """The value of a [[from_step, value], …] schedule at `step`."""
    return [value for start, value in schedule if start <= step][-1]
