"""Ours beside timm's on a CPU, B/16 forward and backward: `python cpu.py`, two minutes.

`--small` runs the same in seconds, to see that it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
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
    """Seconds of one run: by the clock, and of matrix products, attention and all the rest by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        step()
        found = {"all": time.perf_counter() - start, "products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in record.events() or ():
        found[kind(event)] += event.self_cpu_time_total / 1e6
    return found


def training(small: bool) -> dict[str, Any]:
    """timm's model and ours in turn; of each part of the time the least of the rounds."""
    config = VisionTowerConfig.eva02_base(layers=1) if small else VisionTowerConfig.eva02_base()
    batch, repeats = (2, 1) if small else (8, 3)
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
    seconds = {name: {part: min(one[part] for one in found) for part in found[0]} for name, found in runs.items()}
    timm, ours, dropped_seconds = seconds.values()
    return {
        "what": f"EVA02 B/16, {config.layers} layers, batch {batch}, 224 px, float32, forward and backward",
        "seconds": seconds,
        "times_timm": timm["all"] / ours["all"],
        "times_no_patch_dropout": ours["all"] / dropped_seconds["all"],
        "rest_of_timms": ours["rest"] / timm["rest"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    common.write("cpu-small" if small else "cpu", training(small))
