"""`gradient_cache: auto`: the fastest way to run that fits into memory, by predicted time: at once or in chunks of
several sizes, with and without activation checkpointing. On a CPU, of which no speed is known, no chunks if the batch
fits, else the largest that do, and checkpointing as the recipe has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stage_trainer.data.config import DataConfig
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.plan.devices import GIB, Device, alike, free_memory, present
from stage_trainer.plan.hard_negatives import hard_negatives
from stage_trainer.plan.lengths import Lengths, text_lengths
from stage_trainer.plan.memory import Model, Setting, Sizes, estimate
from stage_trainer.plan.planner import (
    FRAGMENTED,
    Cluster,
    as_written,
    model_of,
    segments,
    sizes_of,
    with_chunks,
)
from stage_trainer.plan.step import predict
from stage_trainer.plan.table import describe
from stage_trainer.recipe import GradientCache, ModelConfig, Recipe, Stage


@dataclass(frozen=True)
class Choice:
    """How a range of steps is run.

    Attributes:
        setting: `gradient_cache` (None: no caching) and checkpointing; ZeRO is the recipe's.
        planned: peak of a rank in bytes.
        line: for the log.
        seconds: predicted for a step, on average over the range; None for a device of which too little is known.
    """

    setting: Setting
    planned: int
    line: str
    seconds: float | None = None

    @property
    def cache(self) -> GradientCache | None:
        return self.setting.cache

    def configure(self, model: nn.Module) -> None:
        """Sets the towers' checkpointing to what was chosen."""
        assert isinstance(model, DualEncoder)
        for tower, chosen in (
            (model.text, self.setting.checkpointing_text),
            (model.vision, self.setting.checkpointing_image),
        ):
            if tower.config.checkpointing != chosen:
                tower.configure(checkpointing=chosen)


@dataclass(frozen=True)
class Case:
    """Steps that are alike: what is trained, the largest batch that may come, the usual one, and how many steps."""

    model: Model
    largest: Sizes
    usual: Sizes
    steps: int


def choose(recipe: Recipe, number: int, start: int, stop: int, device: torch.device) -> Choice:
    """Settles how steps `start` to `stop` - 1 of a stage of pairs are run here, the same on every rank.

    Every rank has to call. It counts with the memory of the rank that has least, and with texts as long as they are on
    average for the time, as long as a batch's may be for memory (`Lengths.most`), or `max_tokens` where the data were
    not counted.
    """
    here = _device(device)
    world, budget = _least(here.memory, device)
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world))))
    lengths = _agreed_lengths(recipe, recipe.stage(number), world, device)
    return decide(recipe, number, range(start, stop), Cluster(here, world, machine=machine), budget, lengths)


def decide(
    recipe: Recipe, number: int, steps: range, cluster: Cluster, memory: int, lengths: tuple[Lengths, Lengths]
) -> Choice:
    """What of the ways that fit is predicted to take least time. What the recipe gives stands: sizes of chunks, ZeRO,
    and `checkpointing` of a tower that it mentions.

    Args:
        steps: of the stage.
        memory: bytes of a rank.
        lengths: of texts, as they are on average and as a batch may have them.
    """
    stage, here = recipe.stage(number), cluster.device
    budget = int(memory * (1 - FRAGMENTED))
    cases = list(_cases(recipe, number, steps, cluster, lengths))
    written = as_written(stage, cases[0].model)

    def planned(setting: Setting) -> int:
        return max(estimate(case.model, case.largest, setting, here).total for case in cases)

    def seconds(setting: Setting) -> float | None:
        times = [(case.steps, predict(case.model, case.usual, setting, here, cluster.link)) for case in cases]
        known = [(n, time.total) for n, time in times if time]
        return sum(n * time for n, time in known) / sum(n for n, _ in known) if known else None

    if stage.gradient_cache != "auto":
        line = f"gradient caching: {_words(written.cache)}, as the recipe says"
        return Choice(written, planned(written), line, seconds(written))
    ways = [(way, planned(way), seconds(way)) for way in _ways(recipe.model, written, cases, here, budget, planned)]
    fitting = sorted((way for way in ways if way[1] <= budget), key=lambda one: one[2] or 0.0)
    way, needed, time = fitting[0] if fitting else min(ways, key=lambda one: one[1])
    line = f"gradient caching: auto is {_words(way.cache)} here, {_checkpointing(way)}"
    if time is not None:
        others = [f"{describe(other)}: {slower:.3g} s" for other, _, slower in fitting[1:3] if slower is not None]
        line += f"; predicted {time:.3g} s a step on {here.name}" + (f" ({', '.join(others)})" if others else "")
    line += f"; it needs {_gib(needed)} of {_gib(budget)} on each rank"
    line += f", at once {_gib(ways[0][1])}" if way.cache else ""
    if not fitting:
        line += "; even that may be too much: lower the batch, or set checkpointing or ZeRO"
    return Choice(way, needed, line, time)


def planned_and_measured(planned: int, device: torch.device) -> str | None:
    """A line for the end of a run with the planned peak and the allocator's; None on a CPU, whose allocator does not
    track its peak. Call `torch.cuda.reset_peak_memory_stats` where the run begins."""
    if device.type != "cuda":
        return None
    measured = torch.cuda.max_memory_allocated(device)
    return f"peak memory of a rank: planned {_gib(planned)}, measured {_gib(measured)} ({planned / measured - 1:+.0%})"


def _ways(
    model: ModelConfig,
    written: Setting,
    cases: list[Case],
    here: Device,
    budget: int,
    planned: Callable[[Setting], int],
) -> Iterator[Setting]:
    """What is compared, at once first: none that repeats more than one that fits."""
    bases = [written]
    if here.timed:  # a tower of which the recipe says nothing may have it or not
        said = ["checkpointing" in (of_tower or {}) for of_tower in (model.vision, model.text)]
        stated = written.checkpointing_image, written.checkpointing_text
        for default in (False, True):
            image, text = (value if given else default for value, given in zip(stated, said, strict=True))
            bases.append(replace(written, checkpointing_image=image, checkpointing_text=text))
        bases = list(dict.fromkeys(bases[1:]))
    fits = []
    for base in bases:
        yield base
        fits.append(planned(base) <= budget)
        if fits[0]:
            return
    for base, at_once in zip(bases, fits, strict=True):
        if at_once:  # in chunks it computes more, and takes no less
            continue
        caches = [with_chunks(case.model, case.largest, base, here, budget, case.usual).cache for case in cases]
        images, tokens = (min(getattr(c, kind) for c in caches if c) for kind in ("images", "tokens"))
        yield replace(base, cache=GradientCache(images=images, tokens=tokens))


def _cases(
    recipe: Recipe, number: int, steps: range, cluster: Cluster, lengths: tuple[Lengths, Lengths]
) -> Iterator[Case]:
    stage = recipe.stage(number)
    negatives = hard_negatives(DataConfig.of(recipe), stage)
    for segment in segments(stage):
        first, last = max(steps.start, segment.start), min(steps.stop, segment.stop)
        if first < last:
            model = model_of(recipe, number, segment, cluster.device.precision(recipe.precision))
            usual, largest = (sizes_of(stage, segment, cluster.ranks, found, negatives) for found in lengths)
            yield Case(model, largest, usual, last - first)


def _agreed_lengths(recipe: Recipe, stage: Stage, world: int, device: torch.device) -> tuple[Lengths, Lengths]:
    """(usual lengths, the longest that a batch of one rank may have), the same on all ranks: rank 0 counts."""
    most = float(stage.max_tokens)
    longest = Lengths(most, most, "")
    if device.type == "cpu":  # no times are known, and every batch has to fit
        return longest, longest
    numbers, problem = torch.full((5,), torch.nan, dtype=torch.float64), None
    if world == 1 or torch.distributed.get_rank() == 0:
        try:
            usual = text_lengths(recipe, stage, None)
            bound = usual.most(stage.max_tokens, stage.batch.image_text // world, stage.batch.text // world)
            numbers = numbers.new_tensor([usual.captions, usual.texts, usual.squares, bound.captions, bound.texts])
        except Exception as error:  # the others wait for the numbers; all are to end alike
            problem = error
    if world > 1:
        numbers = numbers.to(device)
        torch.distributed.broadcast(numbers, 0)
    if numbers.isnan().any():
        raise RuntimeError("the first rank could not count the texts' lengths") from problem
    captions, texts, squares, *longest_of = numbers.tolist()
    return Lengths(captions, texts, "", squares=squares), replace(longest, captions=longest_of[0], texts=longest_of[1])


def _device(where: torch.device) -> Device:
    """This rank's device, with the memory that it may have in all."""
    ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if where.type != "cuda":
        return Device("cpu", free_memory(where) // ranks_here, 1.0, None, 1.0, None, kind="cpu")
    capability = torch.cuda.get_device_capability(where)
    found = present(where)
    if found is None:
        found = alike(capability)
        found = replace(found, name=f"{found.name}, the most alike of the devices whose speed is known")
    return replace(found, memory=free_memory(where), capability=capability)


def _least(memory: int, device: torch.device) -> tuple[int, int]:
    """(number of ranks, the least memory of any)."""
    if not torch.distributed.is_initialized():
        return 1, memory
    least: Tensor = torch.tensor(memory, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return torch.distributed.get_world_size(), int(least)


def _words(cache: GradientCache | None) -> str:
    return f"chunks of {cache.images or 'all'} images and {cache.tokens or 'all'} tokens" if cache else "none"


def _checkpointing(setting: Setting) -> str:
    both = {setting.checkpointing_image, setting.checkpointing_text}
    if len(both) == 2:
        return f"checkpointing of {'images' if setting.checkpointing_image else 'texts'} alone"
    return "with checkpointing" if both == {True} else "without checkpointing"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
