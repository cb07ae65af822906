"""What each machine must carry beside its devices: decoding, fetching, exchange, the disk. As the trainer does it: a
machine reads and fetches its own lanes alone (`data.lanes`), and rank 0 writes checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import Dataset, ShardError

from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote_data import place
from stage_trainer.plan.memory import resting_parts
from stage_trainer.plan.planner import Cluster, SegmentPlan, StagePlan, model_of
from stage_trainer.plan.step import exchanged
from stage_trainer.plan.table import wrapped
from stage_trainer.recipe import Recipe, Source

DECODED = {"384 px": 648.0, "2,000 px": 71.0}
"""Images a second that one core decodes, augments and tokenises the captions of, by the originals' longer side: JPEGs,
by simplejpeg, on a core of an AMD EPYC (benchmarks/loader.py)."""
ASSUMED = {"image_text": 50_000, "text": 1_500}
"""Bytes of a sample in its tar where there is no data to look at: a JPEG of 384 px with captions; a pair of texts."""


@dataclass(frozen=True)
class Load:
    """Of one machine, in one way to run a segment.

    Attributes:
        machines: how many there are. devices: of this one.
        images: to decode, a second.
        fetched: bytes of data a second.
        data: bytes of its part of the data sets, of those whose size is known. assumed: whether `fetched` is partly
            from `ASSUMED`.
        sent: bytes that a device sends to the others in a step.
        checkpoint: bytes of one. every: seconds between two; None if there is one at the end alone.
        keep: how many checkpoints stay.
    """

    machines: int
    devices: int
    images: float
    fetched: float
    data: int
    assumed: bool
    sent: int
    checkpoint: int
    every: float | None
    keep: int

    def cores(self, originals: str) -> float:
        """That decode for its devices, one of the keys of DECODED."""
        return self.images / DECODED[originals]


def load_of(recipe: Recipe, plan: StagePlan, part: SegmentPlan, cluster: Cluster) -> Load | None:
    """What a machine carries in a segment, as the recipe runs it or, where that does not fit, in the fastest way that
    does; None where nothing fits or too little is known of the device."""
    option = part.as_written if part.as_written.fits else part.best
    seconds = part.seconds(option, cluster) if option else None
    if option is None or seconds is None:
        return None
    stage, ranks, data = recipe.stage(plan.number), cluster.ranks, DataConfig.of(recipe)
    machines, devices = -(-ranks // cluster.machine), min(ranks, cluster.machine)
    samples = {task: getattr(stage.batch, task) / machines for task in part.segment.tasks}
    shown = 1 + part.sizes.image_negatives
    assumed = {"image_text": shown * ASSUMED["image_text"], "text": ASSUMED["text"]}
    sizes = {task: list(_sizes(data, getattr(stage.data, task), assumed[task])) for task in part.segment.tasks}
    per_step = sum(count * _mean(sizes[task]) for task, count in samples.items())
    model = model_of(recipe, plan.number, part.segment, plan.precision)
    decoded = part.sizes.images and "image" not in model.stored
    moved = sum(exchanged(model, part.sizes, option.setting).values())
    return Load(
        machines=machines,
        devices=devices,
        images=samples["image_text"] * shown / seconds if decoded else 0.0,
        fetched=per_step / seconds,
        data=sum(each.whole or 0 for found in sizes.values() for each in found) // machines,
        assumed=any(each.whole is None for found in sizes.values() for each in found),
        sent=moved * (ranks - 1) // ranks,
        checkpoint=sum(resting_parts(model, zero=0, ranks=1).values()),
        every=seconds * recipe.checkpoint.every if recipe.checkpoint.every else None,
        keep=recipe.checkpoint.keep,
    )


def machines_table(
    recipe: Recipe, plan: StagePlan, cluster: Cluster, cores: int | None = None, fetch: float | None = None
) -> str:
    """What each machine carries in each segment, and what of it holds the devices up.

    Args:
        cores: of one machine. fetch: bytes a second that a machine can fetch. None: not told.
    """
    lines = []
    for part in plan.segments:
        load = load_of(recipe, plan, part, cluster)
        if load:
            lines += _lines(load, part, cores, fetch)
    return "\n".join(wrapped(lines))


def _lines(load: Load, part: SegmentPlan, cores: int | None, fetch: float | None) -> list[str]:
    many = f"each of {load.machines} machines" if load.machines > 1 else "the machine"
    lines = [
        f"  steps {part.segment.start:,} to {part.segment.stop:,}: {many} carries, for its {load.devices} devices,"
    ]
    if load.images:
        needed = " or ".join(f"{load.cores(name):,.1f} cores if they have {name}" for name in DECODED)
        lines.append(f"    {load.images:,.0f} images a second to decode: {needed}")
    said = " (sizes of samples partly assumed)" if load.assumed else ""
    lines.append(f"    {load.fetched / 1e6:,.1f} MB a second of data, if they are behind a URL{said}")
    if load.data:
        lines.append(f"    {load.data / 1e9:,.1f} GB of cache for its part of the data whose size is known")
    if load.sent:
        lines.append(f"    {load.sent / 1e9:,.2f} GB that each device sends to the others in a step")
    often = f" every {load.every / 60:,.0f} minutes" if load.every else " at the end"
    lines.append(
        f"    a checkpoint of {load.checkpoint / 1e9:,.1f} GB{often}: as much main memory while it is written, and "
        f"{load.keep * load.checkpoint / 1e9:,.1f} GB of the first machine's disk"
    )
    holds = []
    if cores is not None and load.images:
        large = [name for name in DECODED if load.cores(name) > cores]
        holds += [f"decoding, if the originals have {large[0]} or more, with {cores} cores"] if large else []
    if fetch is not None and load.fetched > fetch:
        holds.append(f"fetching, at {fetch / 1e6:,.0f} MB a second")
    if holds:
        lines.append(f"    held up by {' and by '.join(holds)}")
    elif cores is not None or fetch is not None:
        lines.append("    nothing of this holds the devices up")
    return lines


@dataclass(frozen=True)
class _Size:
    """Of a data set: its rate, bytes of a sample, and of all if they are known."""

    rate: float
    sample: float
    whole: int | None


def _sizes(config: DataConfig, sources: tuple[Source, ...], assumed: int) -> Iterator[_Size]:
    for source in sources:
        where = place(config, "train", source.path)
        try:
            data = Dataset.open(where, check=False) if isinstance(where, Path) else None
        except (ShardError, OSError):  # a run says what is wrong with it
            data = None
        if data is None or not len(data):
            yield _Size(source.rate, assumed, None)
        else:
            whole = int(data.shards["bytes"].sum())
            yield _Size(source.rate, whole / len(data), whole)


def _mean(sizes: list[_Size]) -> float:
    weight = sum(each.rate for each in sizes)
    return sum(each.rate * each.sample for each in sizes) / weight if weight else 0.0
