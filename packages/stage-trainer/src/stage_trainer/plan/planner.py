"""What fits, how long it takes and what it costs: each stage of a recipe on given devices, before anything runs."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from vision_tower import VisionTowerConfig

from stage_trainer.build import check_configs, empty_model, tower_configs
from stage_trainer.data.config import DataConfig
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.optim.groups import is_muon_matrix
from stage_trainer.plan.devices import GIB, Device
from stage_trainer.plan.flops import Flops, StepShape, kept_patches, step_flops
from stage_trainer.plan.hard_negatives import Negatives, hard_negatives
from stage_trainer.plan.lengths import Lengths, text_lengths
from stage_trainer.plan.memory import Estimate, Model, Setting, Sizes, estimate
from stage_trainer.plan.step import Prediction, predict
from stage_trainer.recipe import GradientCache, Recipe, Stage

RESERVE = 1.5 * GIB  # CUDA's context and libraries, NCCL's buffers
FRAGMENTED = 0.05  # of the memory, lost between blocks that the allocator cannot join
SMALLEST_CHUNK = 8  # images, or texts of the greatest length: below, products are too small to be worth running
LARGEST_CHUNK = 1024, 8192  # images and texts: larger products run no faster
COMPARED = 4  # sizes of chunks whose times are compared, each half of the one before


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, a data-parallel rank on each.

    Attributes:
        price: of one device for one hour.
        loader: images a second that reach one device at most; None: as many as it takes.
        machine: devices of one machine, joined by their own link.
        network: bytes a second that each device sends to other machines.
    """

    device: Device
    ranks: int = 1
    price: float | None = None
    loader: float | None = None
    machine: int = 8
    network: float = 50e9  # 400 Gbit/s for each device, as in DGX H100 and HGX machines

    @property
    def link(self) -> float | None:
        """Bytes a second that ranks exchange: what the slowest way between them carries."""
        ways = [self.device.link, self.network if self.ranks > self.machine else None]
        return min((way for way in ways if way), default=None)

    @property
    def usable(self) -> int:
        """Bytes of one device for what the allocator hands out."""
        if self.device.kind == "cpu":
            return int(self.device.memory * (1 - FRAGMENTED) / self.ranks)
        return max(0, int(self.device.memory * (1 - FRAGMENTED) - RESERVE))


@dataclass(frozen=True)
class Segment:
    """Steps of a stage that are alike: one resolution, one patch dropout, the same tasks."""

    start: int
    stop: int
    resolution: int
    patch_dropout: float
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """One way to run a segment, and what it needs. `time` is that of a step, without waiting for data; None for a
    device of which too little is known."""

    setting: Setting
    memory: Estimate
    fits: bool
    flops: Flops
    time: Prediction | None


@dataclass(frozen=True)
class SegmentPlan:
    """What a segment needs: as the recipe has it, and in other ways."""

    segment: Segment
    samples: int
    sizes: Sizes
    as_written: Option
    tried: tuple[Option, ...]

    @property
    def best(self) -> Option | None:
        """The way that fits and is predicted to take least; without times the first that fits, None if nothing does."""
        fitting = [option for option in self.tried if option.fits]
        return min(fitting, key=lambda option: option.time.total if option.time else 0.0, default=None)

    def seconds(self, option: Option, cluster: Cluster) -> float | None:
        """Of one step, waiting for images included."""
        if option.time is None:
            return None
        return max(option.time.total, self.sizes.images / cluster.loader if cluster.loader else 0.0)


@dataclass(frozen=True)
class StagePlan:
    number: int
    steps: int
    lengths: Lengths
    precision: str
    segments: tuple[SegmentPlan, ...]
    fp8: bool = False

    @property
    def deciding(self) -> SegmentPlan:
        """The segment that needs most memory as the recipe has it: a setting has to serve the whole stage."""
        return max(self.segments, key=lambda plan: plan.as_written.memory.total)


def plan_stage(
    recipe: Recipe,
    number: int,
    cluster: Cluster,
    *,
    mean_tokens: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StagePlan:
    """Plans stage `number`.

    Args:
        mean_tokens: of a text; None: counted on the data, or half of `max_tokens`.
        say: called with a line of progress before each slow part.

    Raises:
        UserError: a stage that is not planned (`Stage.unplanned`), or a model configuration that is not valid.
    """
    stage = recipe.stage(number)
    if stage.unplanned:
        raise UserError(f"stage {number} is not planned: {stage.unplanned}")
    if stage.fp8 and cluster.device.kind == "cuda" and cluster.device.capability < (8, 9):
        raise UserError(
            f"stage {number}: 'fp8' needs a GPU of compute capability 8.9, 9.0 or later, and {cluster.device.name} is "
            "none; leave 'fp8' out, or plan for another"
        )
    check_configs(recipe, number)
    say(f"stage {number}: counting texts …")
    lengths = text_lengths(recipe, stage, mean_tokens)
    precision = cluster.device.precision(recipe.precision)
    plans = []
    cut = segments(stage)
    for turn, segment in enumerate(cut, 1):
        here = f"stage {number}, steps {segment.start:,} to {segment.stop:,} ({turn} of {len(cut)})"
        say(f"{here}: walking through the towers, as the recipe has them …")
        model = model_of(recipe, number, segment, precision)
        sizes = sizes_of(stage, segment, cluster.ranks, lengths, hard_negatives(DataConfig.of(recipe), stage))
        shape = shape_of(stage, segment, sizes, model.vision)
        written = _option(model, shape, sizes, as_written(stage, model), cluster)
        tried: list[Option] = []
        ways = _ways(model, shape, sizes, cluster)
        while True:
            say(f"{here}: trying way {len(tried) + 1} to run it …")
            if (option := next(ways, None)) is None:
                break
            tried.append(option)
        samples = sum(getattr(stage.batch, task) for task in segment.tasks)
        plans.append(SegmentPlan(segment, samples, sizes, written, tuple(tried)))
    return StagePlan(number, stage.steps, lengths, precision, tuple(plans), bool(stage.fp8))


def segments(stage: Stage) -> list[Segment]:
    """The stage, split where its resolution, patch dropout or tasks change."""
    tasks = [task for task in ("image_text", "text") if getattr(stage.batch, task)]
    starts = {0, *(start for start, _ in (*stage.resolution, *stage.patch_dropout))}
    starts |= {getattr(stage.task_start, task) for task in tasks}
    cuts = sorted(start for start in starts if start < stage.steps)
    return [
        Segment(
            start,
            stop,
            stage.resolution_at(start),
            stage.patch_dropout_at(start),
            tuple(task for task in tasks if getattr(stage.task_start, task) <= start),
        )
        for start, stop in zip(cuts, [*cuts[1:], stage.steps], strict=True)
    ]


def model_of(recipe: Recipe, number: int, segment: Segment, precision: str) -> Model:
    """What is trained in a segment; nothing is allocated."""
    stage = recipe.stage(number)
    text, vision = tower_configs(recipe, number)
    vision = dataclasses.replace(vision, resolution=segment.resolution)
    empty = empty_model(recipe, number)
    assert isinstance(empty, DualEncoder)
    empty.vision.set_resolution(segment.resolution)
    empty.text.set_trainable(stage.trainable.text, adapter=next(iter(text.adapters), None))
    empty.vision.set_trainable(stage.trainable.image)
    learning = [p for p in empty.parameters() if p.requires_grad]
    matrices = [p for n, p in empty.named_parameters() if p.requires_grad and is_muon_matrix(n, p)]
    zero = stage.deepspeed.get("zero_optimization", {})
    given = {k: int(v) for k, v in zero.items() if k in ("reduce_bucket_size", "stage3_max_live_parameters")}
    return Model(
        text=text,
        vision=vision,
        trainable=stage.trainable,
        patch_dropout=segment.patch_dropout,
        precision=precision,
        optimizer=recipe.optimizer.name,
        dims=stage.loss.dims,
        exchange=stage.loss.exchange,
        stored=stage.stored,
        fp8=bool(stage.fp8),
        weights=_numbers(empty.parameters()),
        learning=_numbers(learning),
        largest=max((p.numel() for p in learning), default=0),
        matrices=_numbers(matrices),
        deepspeed=tuple(sorted(given.items())),
        muon_shapes=tuple((p.shape[0], p.shape[1]) for p in matrices),
    )


def _numbers(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def sizes_of(stage: Stage, segment: Segment, ranks: int, lengths: Lengths, negatives: Negatives) -> Sizes:
    """One rank's part of a step; the largest part, where the ranks' differ."""
    images, captions, pairs = (-(-count // ranks) for count in stage.counts(segment.tasks))
    texts = captions + pairs * (2 + negatives.texts)
    tokens = captions * lengths.captions + pairs * (2 + negatives.texts) * lengths.texts
    length, unified = max(1, round(tokens / max(1, texts))), stage.loss.unified_pairs(images, pairs)
    return Sizes(
        images * (1 + stage.loss.views + negatives.images), texts, length, pairs, negatives.texts, ranks, unified,
        lengths.squares, negatives.images, stage.replaced,
        stage.taught(images, captions, pairs, negatives.texts), stage.relational,
    )  # fmt: skip


def as_written(stage: Stage, model: Model) -> Setting:
    """The recipe's own setting; one without caching stands for `auto`."""
    zero = stage.deepspeed.get("zero_optimization", {}).get("stage", 0)
    return Setting(stage.chunks, model.vision.checkpointing, model.text.checkpointing, zero)


def _ways(model: Model, shape: StepShape, sizes: Sizes, cluster: Cluster) -> Iterator[Option]:
    """Ways to run: at once, with checkpointing (most of a forward pass more), in chunks (a whole one), both; if none
    fits, the same under ZeRO 1 and then 3, which trade memory for traffic between ranks. (ZeRO 2: see `memory`.) None
    that repeats more than one that fits; where no times are known, none after the first that fits."""
    alone = model.optimizer == "muon" or cluster.ranks == 1  # Muon needs whole matrices
    for zero in (0,) if alone else (0, 1, 3):
        fitting: list[Setting] = []
        for cached in (False, True):
            for checkpointing in (False, True):
                setting = Setting(None, checkpointing, checkpointing, zero)
                if any(cached >= bool(one.cache) and checkpointing >= one.checkpointing_image for one in fitting):
                    continue
                if cached:
                    setting = with_chunks(model, sizes, setting, cluster.device, cluster.usable)
                option = _option(model, shape, sizes, setting, cluster)
                yield option
                if option.fits and option.time is None:
                    return
                if option.fits:
                    fitting.append(setting)
        if fitting:
            return


def with_chunks(
    model: Model, sizes: Sizes, base: Setting, device: Device, usable: int, typical: Sizes | None = None
) -> Setting:
    """`base` with gradient caching in the fastest chunks that fit into `usable` bytes, powers of 2 of images and texts;
    in the largest that fit where no times are known, in the smallest that are worth running if none do. Chunks take
    turns, so each kind is sized by itself. `typical` are the sizes whose time counts, if they differ."""

    def setting(chunk: list[int]) -> Setting:
        return dataclasses.replace(base, cache=GradientCache(images=chunk[0], tokens=chunk[1] * sizes.length))

    def of(kind: int, size: int) -> Setting:
        return setting([size if kind == other else SMALLEST_CHUNK for other in (0, 1)])

    def seconds(kind: int, size: int) -> float:
        time = predict(model, typical or sizes, of(kind, size), device, None)
        return time.total if time else -size

    found = [SMALLEST_CHUNK, SMALLEST_CHUNK]
    for kind, (count, most) in enumerate(zip((sizes.images, sizes.texts), LARGEST_CHUNK, strict=True)):
        if not count:  # no chunk of these will come
            found[kind] = most
            continue
        possible = [SMALLEST_CHUNK]
        while possible[-1] * 2 <= min(count, most):
            possible.append(possible[-1] * 2)

        def needed(size: int, kind: int = kind) -> int:
            return estimate(model, sizes, of(kind, size), device).total

        # Memory rises with the chunk: halve the range until the last size that fits is known.
        fits = possible[: max(1, bisect.bisect_right(possible, usable, key=needed))]
        found[kind] = min(reversed(fits[-COMPARED:]), key=lambda size, kind=kind: seconds(kind, size))  # type: ignore[misc]
    return setting(found)


def _option(model: Model, shape: StepShape, sizes: Sizes, setting: Setting, cluster: Cluster) -> Option:
    found = estimate(model, sizes, setting, cluster.device)
    text = dataclasses.replace(model.text, checkpointing=setting.checkpointing_text)
    vision = dataclasses.replace(model.vision, checkpointing=setting.checkpointing_image)
    cached = setting.cache is not None
    flops = step_flops(text, vision, shape, trainable=model.trainable, dims=model.dims, cached=cached)
    time = predict(model, sizes, setting, cluster.device, cluster.link)
    return Option(setting, found, found.total <= cluster.usable, flops, time)


def shape_of(stage: Stage, segment: Segment, sizes: Sizes, vision: VisionTowerConfig) -> StepShape:
    """The global batch, every text of the mean length."""
    images, captions, pairs = stage.counts(segment.tasks)
    texts = captions + pairs * (2 + sizes.negatives)
    return StepShape(
        images=images * (1 + stage.loss.views + sizes.image_negatives),
        kept_patches=kept_patches(vision, segment.patch_dropout) if images else 0,
        texts=texts,
        tokens=texts * sizes.length,
        squared_tokens=texts * sizes.length**2,
        pairs=pairs,
        negatives=sizes.negatives,
        unified=stage.loss.unified_pairs(images, pairs),
        stored=stage.stored,
        image_negatives=sizes.image_negatives,
        replaced=stage.replaced,
        related=stage.taught(images, captions, pairs, sizes.negatives) if stage.relational else (),
    )
