"""Ours beside timm's on a CPU, B/16 forward and backward, and the pixels before it: `python cpu.py`, four minutes.

`--small` runs the same in seconds, to see that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from vision_tower import VisionTowerConfig, patch_keep_indices, preprocess

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution_backward"}


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of matrix products, attention and all the rest, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    found = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in record.key_averages():
        attention = "scaled_dot_product" in event.key
        kind = "products" if event.key in PRODUCTS else "attention" if attention else "rest"
        found[kind] += event.self_cpu_time_total / 1e6
    return found


def shares_in_turn(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Of several runs in turn, each one's run of median rest, as single runs scatter."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, step in contenders.items():
            runs[name].append(shares(step))
    return {name: sorted(found, key=lambda one: one["rest"])[repeats // 2] for name, found in runs.items()}


def training(small: bool) -> dict[str, Any]:
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
    seconds = common.rounds(contenders, repeats)
    parts = shares_in_turn({name: contenders[name] for name in ("timm", "ours")}, 1 if small else 5)
    return {
        "what": f"EVA02 B/16, {config.layers} layers, batch {batch}, 224 px, float32, forward and backward",
        "seconds": seconds,
        "times_timm": seconds["timm"] / seconds["ours"],
        "times_no_patch_dropout": seconds["ours"] / seconds["ours, patch dropout 0.5"],
        "seconds_by_kind": parts,
        "rest_of_timms": parts["ours"]["rest"] / parts["timm"]["rest"],
    }


def pixels(small: bool) -> list[dict[str, Any]]:
    """Shortest edge and centre crop, from decoded pixels: Pillow's way and the tensor's."""
    figures = []
    for (height, width), resolution in (((480, 640), 224), ((768, 1024), 384), ((1080, 1920), 512)):
        array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, tensor = Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1).contiguous()
        contenders = {
            "pillow": lambda image=image, resolution=resolution: preprocess(image, resolution),
            "tensor": lambda tensor=tensor, resolution=resolution: preprocess(tensor, resolution),
        }
        seconds = common.rounds(contenders, 2 if small else 20)
        milliseconds = {name: 1e3 * value for name, value in seconds.items()}
        figures.append({"what": f"{width}x{height} to {resolution}", "milliseconds": milliseconds})
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    common.write("cpu-small" if small else "cpu", {"training": training(small), "pixels": pixels(small)})
