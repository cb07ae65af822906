"""`gradient_cache: auto`: no caching if the batch fits into memory at once, else the largest chunks that fit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stage_trainer.plan.devices import GIB, Device, free_memory, present
from stage_trainer.plan.lengths import Lengths
from stage_trainer.plan.memory import Setting, estimate
from stage_trainer.plan.planner import FRAGMENTED, as_written, hard_negatives, model_of, segments, sizes_of
from stage_trainer.plan.planner import with_chunks as largest_chunks
from stage_trainer.recipe import GradientCache, Recipe


@dataclass(frozen=True)
class Choice:
    """`gradient_cache` for a range of steps (None: no caching), the planned peak of a rank in bytes, and a line for the
    log."""

    cache: GradientCache | None
    planned: int
    line: str


def choose(recipe: Recipe, number: int, start: int, stop: int, device: torch.device) -> Choice:
    """Settles the chunks for steps `start` to `stop` - 1 of a stage of pairs, the same on every rank.

    Every rank has to call. Sizes that the recipe gives stand; `auto` is settled by the rank that has least memory, with
    every text taken as long as `max_tokens`, so that no batch comes out larger. Checkpointing and ZeRO stay as written.
    """
    stage = recipe.stage(number)
    here = _device(device)
    world, budget = _least(here.memory, device)
    budget = int(budget * (1 - FRAGMENTED))
    longest = Lengths(stage.max_tokens, stage.max_tokens, "")
    negatives = hard_negatives(recipe, stage)
    cases = []
    for segment in segments(stage):
        if segment.start < stop and segment.stop > start:
            model = model_of(recipe, number, segment, here.precision(recipe.precision))
            cases.append((model, sizes_of(stage, segment, world, longest, negatives)))
    written = as_written(stage, cases[0][0])

    def planned(setting: Setting) -> int:
        return max(estimate(model, sizes, setting, here).total for model, sizes in cases)

    if stage.gradient_cache != "auto":
        return Choice(written.cache, planned(written), f"gradient caching: {_words(written.cache)}, as the recipe says")
    if (whole := planned(written)) <= budget:
        line = f"gradient caching: auto is none here: the batch needs {_gib(whole)} of {_gib(budget)} on each rank"
        return Choice(None, whole, line)
    caches = [largest_chunks(model, sizes, written, here, budget).cache for model, sizes in cases]
    cache = GradientCache(images=min(c.images for c in caches if c), tokens=min(c.tokens for c in caches if c))
    needed = planned(replace(written, cache=cache))
    short = "" if needed <= budget else "; even that may be too much: lower the batch, or set checkpointing or ZeRO"
    return Choice(
        cache,
        needed,
        f"gradient caching: auto is {_words(cache)} here: at once the batch needs {_gib(whole)}, in chunks "
        f"{_gib(needed)}, and each rank has {_gib(budget)}{short}",
    )


def planned_and_measured(planned: int, device: torch.device) -> str | None:
    """A line for the end of a run with the planned peak and the allocator's; None on a CPU, whose allocator does not
    track its peak. Call `torch.cuda.reset_peak_memory_stats` where the run begins."""
    if device.type != "cuda":
        return None
    measured = torch.cuda.max_memory_allocated(device)
    return f"peak memory of a rank: planned {_gib(planned)}, measured {_gib(measured)} ({planned / measured - 1:+.0%})"


def _device(where: torch.device) -> Device:
    """This rank's device, with the memory that it may have in all."""
    ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if where.type != "cuda":
        return Device("cpu", free_memory(where) // ranks_here, 1.0, None, 1.0, None, kind="cpu")
    capability = torch.cuda.get_device_capability(where)
    unknown = Device("", 0, 1.0, 1.0, 1.0, None, capability)  # precision is settled before; speed plays no part
    return replace(present(where) or unknown, memory=free_memory(where), capability=capability)


def _least(memory: int, device: torch.device) -> tuple[int, int]:
    """(number of ranks, the least memory of any)."""
    if not torch.distributed.is_initialized():
        return 1, memory
    least: Tensor = torch.tensor(memory, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return torch.distributed.get_world_size(), int(least)


def _words(cache: GradientCache | None) -> str:
    return f"chunks of {cache.images or 'all'} images and {cache.tokens or 'all'} tokens" if cache else "none"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
