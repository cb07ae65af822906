"""Ours beside timm's on a CPU, B/16 forward and backward: `python cpu.py`, four minutes.

`--small` runs the same in seconds, to see that it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import common
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from vision_tower import VisionTowerConfig, patch_keep_indices

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution_backward"}


def kind(event: FunctionEvent) -> str:
    """What an operation is part of: a bias that is copied in before a product is added to it is the product's."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name in PRODUCTS:
            return "products"
        if "scaled_dot_product" in at.name:
            return "attention"
        at = at.cpu_parent
    return "rest"


def timed(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one run: by the clock, and of matrix products, attention and all the rest by the profiler, whose own
    time is less than two runs differ by."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        step()
        found = {"all": time.perf_counter() - start, "products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in record.events() or ():
        found[kind(event)] += event.self_cpu_time_total / 1e6
    return found


def training(small: bool) -> dict[str, Any]:
    """timm's model and ours in turn: medians of the seconds, and of the ratios within each round, because a machine's
    speed drifts by more than what is to be told apart."""
    config = VisionTowerConfig.eva02_base(layers=1) if small else VisionTowerConfig.eva02_base()
    batch, repeats = (2, 1) if small else (8, 7)
    tower, model = common.pair(config)
    images = torch.randn(batch, 3, 224, 224)

    def step(network: Any, **options: Any) -> None:
        network.zero_grad()
        network(images, **options).square().mean().backward()

    def dropped() -> None:
        step(tower, keep=patch_keep_indices(torch.arange(batch), config.num_patches, 0.5))

    contenders = {"timm": lambda: step(model), "ours": lambda: step(tower), "ours, patch dropout 0.5": dropped}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            runs[name].append(timed(run))
    timm, ours, half = runs.values()

    def ratio(over: list[dict[str, float]], under: list[dict[str, float]], part: str = "all") -> dict[str, float]:
        found = [a[part] / b[part] for a, b in zip(over, under, strict=True)]
        return {"median": median(found), "least": min(found), "most": max(found)}

    return {
        "what": f"EVA02 B/16, {config.layers} layers, batch {batch}, 224 px, float32, forward and backward",
        "rounds": repeats,
        "seconds": {name: {p: median(one[p] for one in found) for p in found[0]} for name, found in runs.items()},
        "times_timm": ratio(timm, ours),
        "times_no_patch_dropout": ratio(ours, half),
        "rest_of_timms": ratio(ours, timm, "rest"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    common.write("cpu-small" if small else "cpu", training(small))
