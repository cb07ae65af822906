"""What the benchmarks share: the recipe and its batches, our step, the clock, the profile, the results file."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stage_trainer.batch import Batch
from stage_trainer.build import build_model, load_tokenizer
from stage_trainer.data.batches import StageBatches
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine import make_engine
from stage_trainer.recipe import GradientCache, Recipe
from stage_trainer.recipe.read import load
from stage_trainer.run.environment import keep_freed_memory, quiet
from stage_trainer.run.rendezvous import initialize_distributed
from stage_trainer.tasks import make_task
from stage_trainer.tasks.contrastive import forward_backward
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import PackedTokens
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
PRODUCTS = {"aten::mm", "aten::addmm", "aten::mkldnn_convolution", "aten::convolution_backward"}
# Where it is not one kernel: products of many pairs of matrices, of which there are no others, what they copy, softmax.
ATTENTION = {"aten::matmul", "aten::bmm", "aten::_softmax", "aten::_softmax_backward_data"}


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options of every script; `name` is that of its results file."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--corpus", default="runs/corpus", help="the laptop corpus; with --small the drawn one")
    made.add_argument("--small", action="store_true", help="the drawn recipe's towers, to see that it runs")
    made.add_argument("--results", type=Path, default=Path(__file__).with_name("results") / f"{name}.json")
    return made


def recipe_of(options: argparse.Namespace, *overrides: str) -> Recipe:
    """laptop.yaml, or with --small drawn.yaml, on the corpus of the command line; bare keys are stage 1's."""
    path = RECIPES / ("drawn.yaml" if options.small else "laptop.yaml")
    corpus = f"corpus={options.corpus}", f"model.tokenizer={options.corpus}/tokenizer.model"
    return load(path, [*corpus, "precision=fp32", *overrides], stage=1).recipe


def start(*, group: bool = True) -> None:
    """One process, one thread, as `stage-trainer train` sets itself up; what it does to malloc serves everybody.

    Args:
        group: with a process group of one rank, which ours needs. accelerate would wrap a model for it.
    """
    quiet()
    if group:
        initialize_distributed()
    torch.set_num_threads(1)
    keep_freed_memory()


def data_of(recipe: Recipe) -> StageBatches:
    """The batches of stage 1."""
    made = make_task(recipe, 1).make_batches(load_tokenizer(recipe), 0, 1)
    assert isinstance(made, StageBatches)
    return made


def first_batches(recipe: Recipe, count: int) -> list[Batch]:
    """Batches of stage 1 as one rank gets them, but for this: no two samples count as the same item, because the other
    trainers know no items, and all shall compute the same loss."""
    found = []
    for batch, _ in map(data_of(recipe).__getitem__, range(count)):
        images, texts = torch.arange(len(batch.image_ids)), torch.arange(len(batch.text_ids))
        found.append(dataclasses.replace(batch, image_ids=images, text_ids=texts))
    return found


def model_of(recipe: Recipe) -> DualEncoder:
    """The model of stage 1, with the same random weights for each seed."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, 1, load_tokenizer(recipe))
    assert isinstance(model, DualEncoder)
    return model


class Ours:
    """The trainer's step on the model of stage 1: the objective forward and backward, the engine with its optimizer.

    Args:
        recipe: of which stage 1 counts.
        cache: chunks for gradient caching.
    """

    def __init__(self, recipe: Recipe, cache: GradientCache | None = None):
        self.stage, self.cache = recipe.stage(1), cache
        self.model = model = model_of(recipe)
        self.tasks = tuple(t for t in ("image_text", "text") if getattr(self.stage.batch, t))
        objective = ContrastiveObjective(model, self.stage.loss, recipe.precision)
        objective.set_trainable(self.stage)
        self.engine = make_engine(
            objective,
            objective.parameter_groups(self.stage, recipe.optimizer),
            recipe.optimizer,
            precision=recipe.precision,
            deepspeed=self.stage.deepspeed,
        )
        self.engine.train()

    def step(self, batch: Batch, *, patch_dropout: float = 0.0, tasks: tuple[str, ...] | None = None) -> float:
        """The sum of the losses, before the update."""
        losses = forward_backward(
            self.engine, batch, pairs=tasks or self.tasks, patch_dropout=patch_dropout, cache=self.cache
        )
        assert self.engine.step()
        self.engine.objective.after_step(self.engine)
        return sum(loss.item() for loss, _ in losses.values())


def cut(texts: PackedTokens, *sizes: int) -> list[list[torch.Tensor]]:
    """The ids of each text, in groups of so many texts."""
    ids = iter(torch.split(texts.ids, list(texts.lengths)))
    return [[next(ids) for _ in range(size)] for size in sizes]


def of_one_length(batch: Batch, length: int, vocabulary: int) -> Batch:
    """The batch with other texts: as many, of random tokens, all of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary - 1, (len(batch.text_seeds), length), generator=generator)
    return dataclasses.replace(batch, texts=PackedTokens.from_lists(ids.tolist()))


def with_padding(batch: Batch, *groups: int) -> Batch:
    """The batch with each text lengthened to the longest of its group, of so many texts each: what a trainer computes
    that pads."""
    assert isinstance(batch.texts, PackedTokens)
    longer = []
    for group in cut(batch.texts, *groups):
        longest = max(map(len, group))
        longer += [[*ids.tolist(), *[5] * (longest - len(ids))] for ids in group]
    return dataclasses.replace(batch, texts=PackedTokens.from_lists(longer))


def tokens(batches: Iterable[Batch]) -> int:
    return sum(len(batch.texts.ids) for batch in batches if isinstance(batch.texts, PackedTokens))


def text_part(model: DualEncoder, batch: Batch) -> None:
    """The text tower's share of a step: its forward and backward pass alone."""
    assert batch.texts is not None
    model.text(batch.texts, sample_seeds=batch.text_seeds).square().sum().backward()
    model.text.zero_grad()


def rounds(contenders: Mapping[str, list[Callable[[], Any]]], repeats: int) -> dict[str, float]:
    """Seconds of each contender for all of its runs, each run counting with its best time of `repeats` rounds in which
    the contenders take turns, after one round that does not count."""
    best = {name: [float("inf")] * len(runs) for name, runs in contenders.items()}
    for turn in range(repeats + 1):
        for name, runs in contenders.items():
            for number, run in enumerate(runs):
                began = time.perf_counter()
                run()
                if turn:
                    best[name][number] = min(best[name][number], time.perf_counter() - began)
    return {name: sum(times) for name, times in best.items()}


def by_kind(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a step in matrix products, in attention (batched products and softmax), in other operations."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    found = {"products": 0.0, "attention": 0.0, "other": 0.0}
    for event in record.events() or ():
        found[_kind(event)] += event.self_cpu_time_total / 1e6
    return found


def _kind(event: FunctionEvent) -> str:
    """What an operation is part of: a bias that is copied in before a product is added to it is the product's."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name in PRODUCTS:
            return "products"
        if at.name in ATTENTION or "scaled_dot_product" in at.name:
            return "attention"
        at = at.cpu_parent
    return "other"


def anatomy(steps: Mapping[str, Callable[[], Any]], seconds: Mapping[str, float], repeats: int) -> dict[str, Any]:
    """Of each contender's step: products and attention as the profiler finds them (the least of the rounds), and what
    is neither: all the rest of the time that the clock found without the profiler, Python and waiting included. "no
    products" is all but the products, since one kernel's attention cannot be divided."""
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, step in steps.items():
            for kind, value in by_kind(step).items():
                kinds = found.setdefault(name, {})
                kinds[kind] = min(kinds.get(kind, float("inf")), value)
    for name, kinds in found.items():
        whole, rest = seconds[name], seconds[name] - kinds["products"]
        neither = rest - kinds["attention"]
        kinds |= {"step": whole, "no_products": rest, "no_products_share": rest / whole}
        kinds |= {"neither": neither, "neither_share": neither / whole}
    return found


def padding(seconds: Mapping[str, float], real: int, padded: int) -> dict[str, float]:
    """What never computing padding gains within our trainer, and what it could gain at most: that the text tower's time
    shrinks as its tokens do and nothing else changes.

    Args:
        seconds: of the step, "ours", and of the text tower's forward and backward pass alone, "text tower"; of both on
            texts lengthened to what others pad to, "ours, padded" and "text tower, padded".
        real, padded: tokens.
    """
    spare = seconds["text tower, padded"] * (1 - real / padded)
    gain, most = (seconds["ours, padded"] / t for t in (seconds["ours"], seconds["ours, padded"] - spare))
    return {
        "real_tokens": real,
        "padded_tokens": padded,
        "times_faster": gain,
        "at_most": most,
        "share_of_at_most": gain / most,
        "text_tower_share_of_spare_time": (seconds["text tower, padded"] - seconds["text tower"]) / spare,
    }


def with_text_towers(mixed: dict[str, list[Any]], ours: Ours, batches: list[Batch], longest: list[Batch]) -> None:
    """Adds to `mixed`, where ours is, what `padding` compares."""
    mixed["ours, padded"] = [partial(ours.step, batch) for batch in longest]
    mixed["text tower"] = [partial(text_part, ours.model, batch) for batch in batches]
    mixed["text tower, padded"] = [partial(text_part, ours.model, batch) for batch in longest]


def shape(recipe: Recipe) -> dict[str, Any]:
    return {"text": recipe.model.text, "vision": recipe.model.vision, "resolution": recipe.stage(1).resolution_at(0)}


def write(path: Path, settings: Mapping[str, Any], results: Any) -> None:
    """Prints the results and writes them, with the machine that they were measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    libraries = ("torch", "transformers", "timm", "deepspeed", "open_clip_torch", "sentence-transformers")
    machine = {
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps({"machine": machine, "settings": settings, "results": results}, indent=2)
    print(text)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
