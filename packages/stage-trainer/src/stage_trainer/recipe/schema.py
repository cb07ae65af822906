"""A recipe: model, data and the list of stages, in one YAML file.

The classes below are the whole schema. A value that the paper does not give is tagged `!ours` in the file
(`warmup_steps: !ours 2000`); in a recipe with `paper:` everything without that tag is the paper's.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from stage_trainer.errors import UserError

_STRICT = ConfigDict(extra="forbid", strict=False)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected here, and true or false is none")
    return value


Int = Annotated[int, BeforeValidator(_no_truth)]
Float = Annotated[float, BeforeValidator(_no_truth)]
"""Numbers of YAML. A `true` would otherwise pass for 1; 1e5 passes for 100000 where whole numbers are expected."""


@dataclass(frozen=True, config=_STRICT)
class PerTask:
    """The step from which a task takes part, or the global batch sizes."""

    image_text: Int = 0
    text: Int = 0


@dataclass(frozen=True, config=_STRICT)
class BatchSizes(PerTask):
    """Global batch sizes: of pairs, or, in a stage of masked-language-model training, of texts and nothing else."""

    masked_lm: Int = 0


@dataclass(frozen=True, config=_STRICT)
class PerTower:
    """One number for each tower."""

    image: Float = 1.0
    text: Float = 1.0


@dataclass(frozen=True, config=_STRICT)
class Rates:
    """Peak learning rates. The image tower and the temperature of the image-text loss train at `image`, the text tower
    and the temperature of the text loss at `text`. None: left out, which is for where nothing trains at it."""

    image: Float | None = None
    text: Float | None = None


@dataclass(frozen=True, config=_STRICT)
class Trainable:
    """Which parameters train: `all`, `none`, or for the text tower the LoRA `adapters` alone."""

    image: Literal["all", "none"] = "all"
    text: Literal["all", "adapters", "none"] = "all"


@dataclass(frozen=True, config=_STRICT)
class Source:
    """A data set (a directory with a manifest, below the corpus, or a URL) and how often it is drawn, relative to the
    others of its task.

    Of texts that say the same in several languages one is drawn; `target_language` names the one that targets of text
    pairs shall have where there is a choice (English as the pivot of thirty languages, say).
    """

    path: str
    rate: Float = 1.0
    target_language: str | None = None


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The data sets of each task; those of `masked_lm` (text pairs or triplets, as single texts) have no rates: how
    often a language is drawn follows from how many texts it has."""

    image_text: tuple[Source, ...] = ()
    text: tuple[Source, ...] = ()
    masked_lm: tuple[str, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class LossConfig:
    """Matryoshka InfoNCE, summed over `dims`. `multi_task`: a loss and a temperature for each task (paper, sections 3.3
    and 3.4). `unified`: one for the pairs of both tasks in one batch, and for two strongly augmented views of each
    image unless `image_views` is false (section 5.2; `contrastive_losses.unified_info_nce`)."""

    kind: Literal["multi_task", "unified"] = "multi_task"
    dims: tuple[Int, ...] = ()
    image_views: bool = True
    min_temperature: Float = 0.01

    @property
    def views(self) -> int:
        """Augmented views of each image, beside the one that its caption is for."""
        return 2 if self.kind == "unified" and self.image_views else 0

    def unified_pairs(self, captions: int, pairs: int) -> int:
        """Pairs of a unified loss, of so many captioned images and text pairs; 0 where each task has its own loss."""
        return captions * (1 + self.views // 2) + pairs if self.kind == "unified" else 0


@dataclass(frozen=True, config=_STRICT)
class MaskingConfig:
    """Masked-language-model training: the `share` of the words that are hidden, and languages drawn in proportion to
    their number of texts to the power of `language_exponent` (both as in XLM-R, arXiv 1911.02116)."""

    share: Float = 0.15
    language_exponent: Float = 0.3


@dataclass(frozen=True, config=_STRICT)
class AugmentationConfig:
    """Random resized crop of training images: share of the area kept, aspect ratios, flips, colour jitter."""

    scale: tuple[Float, Float] = (0.9, 1.0)
    ratio: tuple[Float, Float] = (0.75, 1.3333)
    flip: bool = False
    color: Float = 0.0


@dataclass(frozen=True, config=_STRICT)
class GradientCache:
    """Chunks of a rank's part of a batch, for gradient caching: images and text tokens in one forward pass (0: all).
    Masked-language-model training needs no cache: its chunks' gradients are added up. In place of sizes, `auto` settles
    them, or on none, by the memory that a run finds (`plan.auto`)."""

    images: Int = 0
    tokens: Int = 0


@dataclass(frozen=True, config=_STRICT)
class Stage:
    """One stage. `resolution` and `patch_dropout` are lists of [from_step, value]. It starts from the model that the
    stage before left, and with `carry_optimizer` from its optimizer's moments, too, by parameter name.

    A stage with `batch.masked_lm` trains the text tower alone, to predict hidden words; nothing that is about images,
    pairs or embeddings bears on it, and it needs no `resolution` and no `loss`.
    """

    steps: Int
    max_tokens: Int
    batch: BatchSizes
    lr: Rates
    data: DataConfig
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
    carry_optimizer: bool = False
    gradient_cache: GradientCache | Literal["auto"] | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        """Whether this is a stage of masked-language-model training."""
        return bool(self.batch.masked_lm)

    @property
    def chunks(self) -> GradientCache | None:
        """The sizes of `gradient_cache`; None for none, and for an `auto` that nobody has settled yet."""
        return self.gradient_cache if isinstance(self.gradient_cache, GradientCache) else None

    def resolution_at(self, step: int) -> int:
        return at_step(self.resolution, step)

    def patch_dropout_at(self, step: int) -> float:
        return at_step(self.patch_dropout, step)


@dataclass(frozen=True, config=_STRICT)
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
"""As CLIP's (arXiv 2103.00020)."""


@dataclass(frozen=True, config=_STRICT)
class Override:
    """What shall be other than the weights have it: fields of a tower, and where both temperatures start."""

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    temperature: Float | None = None


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Fields of `TextTowerConfig` and `VisionTowerConfig`; weights to start from; the tokenizer's file.

    A recipe whose stages are all masked-language-model training needs no `vision`.

    `weights` is a whole model: a directory that `export` wrote or a checkpoint's `model/`, or one of jina-clip-v2;
    `text_weights` and `vision_weights` are towers, directories or hub names that their `from_pretrained` (or timm)
    read, and go before it. Without any the towers start from random weights.

    Weights bring what belongs to them: shapes, rotary base, epsilons, adapters with their rank and alpha, instructions,
    and a whole model's temperatures and, where `tokenizer` is left out, its tokenizer. `text` and `vision` then need
    not say it, and may not say otherwise, but under `override`. Dropout, lengths, checkpointing, attention and
    compilation are the recipe's (`max_length`, where it is left out, the weights').

    `temperature` is where both temperatures of a new model start (None: `NEW_TEMPERATURE`).
    """

    text: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    vision: dict[str, Any] | None = None
    weights: str | None = None
    text_weights: str | None = None
    vision_weights: str | None = None
    temperature: Float | None = None
    override: Override = field(default_factory=Override)


@dataclass(frozen=True, config=_STRICT)
class EvaluationConfig:
    """What is measured on validation pools every `every` steps (0: never): recall@5 on data sets of captioned images
    (of pages that answer queries nDCG@5, too), nDCG@10 on text pairs, Spearman's correlation where these have a
    "score". A stage of masked-language-model training measures its loss on the validation split of its own data
    instead."""

    every: Int = 0
    pools: tuple[str, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """A checkpoint every `every` steps (0: only at the end and at a change of resolution); the newest `keep` stay.

    `best` names something that is measured in training, as TensorBoard shows it ("validation_recall_at_5_emoji/text to
    image"): whenever that is better than before, a checkpoint is written, and the best one stays too.
    """

    every: Int = 0
    keep: Int = 2
    best: str | None = None


@dataclass(frozen=True, config=_STRICT)
class RemoteConfig:
    """How data under URLs is read: a `corpus` or `path` that is https://…, s3://…, gs://…, hf://… or what else fsspec
    opens.

    Shards are fetched whole into the folder `cache`, which all processes of a machine share, and other runs may; of
    its files, beyond `gigabytes` (none: no limit), those that were not read for the longest go. `downloads` at once are
    fetched before they are needed. A server that is silent for `timeout` seconds, or fails in a way that may pass, is
    asked `retries` times more. `pipe:COMMAND` is a shell command that prints the file for which its {name} stands: only
    with `allow_pipe`.
    """

    cache: str = "~/.cache/trilith"
    gigabytes: Float | None = None
    downloads: Int = 8
    timeout: Float = 60.0
    retries: Int = 6
    allow_pipe: bool = False


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """A whole training, from the start to the last stage.

    `precision` is what the towers compute in; `auto` is bf16 where the machine multiplies in bfloat16 and fp32 where it
    would have to emulate that, which is up to ten times slower than fp32. Of the samples drawn, up to the share
    `max_corrupt` may be unreadable or of no use; they are replaced and entered in `corrupt.jsonl`. A step whose
    gradient is not finite is skipped; `max_skipped` in a row end the run. `sinks` take the scalars beside TensorBoard
    ("module:callable", see `stage_trainer.run.monitor.Sink`). Each process keeps `cache_megabytes` of decoded samples
    in main memory.
    """

    name: str
    output: str
    corpus: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    paper: str | None = None
    seed: Int = 0
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    workers: Int = 0
    cache_megabytes: Int = 0
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    max_corrupt: Float = 0.01
    max_skipped: Int = 5
    log_every: Int = 10
    sinks: tuple[str, ...] = ()
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


_T = TypeVar("_T")


def at_step(schedule: tuple[tuple[int, _T], ...], step: int) -> _T:
    """The value of a [[from_step, value], …] schedule at `step`."""
    value = schedule[0][1]
    for start, candidate in schedule:
        if step >= start:
            value = candidate
    return value
