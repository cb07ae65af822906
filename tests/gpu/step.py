"""A training step of L/14 and the 561M text tower as one of eight ranks: time, memory, MFU, and what the planner says.

Without gradient caching on one chunk of 256 images and 16,384 tokens, with it on two; with and without activation
checkpointing; eager and compiled. Then blocks compiled in FP8, and the whole share of a rank of the paper's batch, in
chunks of two sizes and once more in FP8. A CPU emulates FP8.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from report import NEEDS_CUDA, Report, peak_of, run_part, seconds_of
from shapes import RANKS, Rank, drawn_batch
from stage_trainer.batch import Batch
from stage_trainer.errors import UserError
from stage_trainer.plan.devices import Device, peak_flops, present
from stage_trainer.plan.memory import Model, Setting, Sizes, estimate
from stage_trainer.plan.planner import model_of, segments
from stage_trainer.plan.step import predict
from stage_trainer.recipe import GradientCache
from stage_trainer.run.device import check_fp8
from text_tower import PackedTokens

SAME_LOSS = 2e-3
"""Relative, of a compiled step and an eager one in bfloat16."""


def measure(report: Report) -> None:
    rank = Rank.start(report)
    stage = rank.recipe.stage(1)
    planned = model_of(rank.recipe, 1, segments(stage)[0], rank.recipe.precision)
    report.note("settings", {
        "ranks": RANKS, "chunk_images": rank.chunks.images, "chunk_tokens": rank.chunks.tokens,
        "precision": rank.recipe.precision, "parameters": planned.weights, "zero": stage.deepspeed,
    })  # fmt: skip
    compare_losses(report, rank)
    found: dict[str, Any] = {}
    for compiled in (False, True):
        for cached in (False, True):
            for checkpointing in (False, True):
                way = Way(rank, planned, rank.batch(1 + cached), cached, checkpointing, compiled)
                turns = (2, 1 + compiled) if report.cuda else (1, 0)
                found[way.name] = report.tried(way.name, partial(way.figures, report, *turns))
                report.note("steps", found)
    whole = whole_share(rank) if report.cuda else rank.batch(3)
    for factor in (1, 2):
        rank.chunks = GradientCache(factor * rank.chunks.images, factor * rank.chunks.tokens)
        way = Way(rank, planned, whole, True, False, True)
        title = f"the paper's batch in chunks of {rank.chunks.images}: {way.name}"
        report.note(title, report.tried(title, partial(way.figures, report, 1, int(report.cuda))))
    for size in ("the paper's batch", "two chunks"):  # last, so that no other figure pays for what it costs
        way = Way(rank, planned, whole if size != "two chunks" else rank.batch(2), True, False, report.cuda, fp8=True)
        title, measured = f"{size} in chunks of {rank.chunks.images}: {way.name}", partial(way.figures, report, 1)
        report.note(title, report.tried(title, partial(measured, 2 * report.cuda), absent=(UserError,)))
        rank.chunks = half(rank.chunks)


def compare_losses(report: Report, rank: Rank) -> None:
    """Before any update: the same weights have the same loss in every way."""
    losses = {}
    for compiled in (False, True):
        for cached in (False, True):
            rank.configure(checkpointing=cached, compiled=compiled)
            name = f"{'compiled' if compiled else 'eager'}, {'cached' if cached else 'at once'}"
            losses[name] = rank.forward_backward(rank.batch(1), half(rank.chunks) if cached else None)
            for parameter in rank.model.parameters():
                parameter.grad = None
    report.note("losses", losses)
    first, *others = losses.values()
    worst = max(abs(other / first - 1) for other in others)
    report.check(worst < SAME_LOSS, f"the same weights have losses {worst:.1e} apart")


def half(chunks: GradientCache) -> GradientCache:
    return GradientCache(images=chunks.images // 2, tokens=chunks.tokens // 2)


def whole_share(rank: Rank) -> Batch:
    """What each of eight ranks has of the paper's batch; half of a text's `max_tokens` on average."""
    stage = rank.recipe.stage(1)
    images, pairs = (getattr(stage.batch, kind) // RANKS for kind in ("image_text", "text"))
    return drawn_batch(images, pairs, stage.max_tokens // 2, rank.recipe)


@dataclasses.dataclass
class Way:
    """One way to run a step."""

    rank: Rank
    planned: Model
    batch: Batch
    cached: bool
    checkpointing: bool
    compiled: bool
    fp8: bool = False

    @property
    def name(self) -> str:
        words = "cached" if self.cached else "at once", "checkpointing" if self.checkpointing else "all kept"
        return ", ".join(["compiled" if self.compiled else "eager", *words, *(["FP8"] if self.fp8 else [])])

    @property
    def cache(self) -> GradientCache | None:
        return self.rank.chunks if self.cached else None

    def figures(self, report: Report, repeats: int, warm: int) -> dict[str, Any]:
        device = report.device
        if self.fp8:
            check_fp8(True if report.cuda else "emulate", "bf16", device)
        self.rank.configure(checkpointing=self.checkpointing, compiled=self.compiled, fp8=self.fp8)
        step = partial(self.rank.step, self.batch, self.cache)
        times = seconds_of(step, device, repeats, warm)
        flops = self.rank.flops(self.batch, self.cache, self.checkpointing)
        peak = peak_flops(device, self.rank.recipe.precision)
        used: dict[str, Any] = {"mfu": NEEDS_CUDA, "hardware_utilisation": NEEDS_CUDA}
        if device.type == "cuda":
            unknown = f"no peak of {torch.cuda.get_device_name()} in plan/devices.py"
            shares = {"mfu": flops.model, "hardware_utilisation": flops.total}
            used = {name: work / times["seconds"] / peak if peak else unknown for name, work in shares.items()}
        assert isinstance(self.batch.texts, PackedTokens)
        return {
            "images": len(self.batch.image_ids),
            "tokens": len(self.batch.texts.ids),
            **times,
            "flops_per_second": flops.model / times["seconds"],
            **used,
            "peak_bytes": peak_of(step, device),
            # The planner may be wrong in a way of its own, which costs no measurement.
            "planner": report.tried(f"{self.name}, planner", partial(self.predicted, device)),
        }

    def predicted(self, device: torch.device) -> dict[str, Any]:
        """What `stage-trainer plan` says of it."""
        zero = self.rank.recipe.stage(1).deepspeed["zero_optimization"]["stage"]
        setting = Setting(self.cache, self.checkpointing, self.checkpointing, zero)
        text, vision = self.planned.text, self.planned.vision
        text, vision = replace(text, compile=self.compiled), replace(vision, compile=self.compiled)
        model = replace(self.planned, text=text, vision=vision, fp8=self.fp8)
        here, sizes = device_of(device), self.rank.sizes(self.batch)
        planned = estimate(model, sizes, setting, here).total
        return {"predicted_peak_bytes": planned, **predicted_time(model, sizes, setting, here)}


def predicted_time(model: Model, sizes: Sizes, setting: Setting, here: Device) -> dict[str, Any]:
    """Without communication, as it is measured."""
    prediction = predict(model, sizes, setting, here, None)
    if prediction is None:
        return {"predicted_seconds": f"too little is known of {here.name or 'this device'}"}
    return {"predicted_seconds": prediction.total, "predicted_parts": dict(prediction.parts)}


def device_of(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("cpu", 0, 1.0, None, 1.0, None, kind="cpu")
    capability = torch.cuda.get_device_capability(device)
    return replace(present(device) or Device("", 0, 1.0, 1.0, 1.0, None), capability=capability)


if __name__ == "__main__":
    run_part(measure)
