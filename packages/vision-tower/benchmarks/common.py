"""What the benchmarks share: the two models with one set of weights, the clock, and the results file."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from vision_tower import VisionTower, VisionTowerConfig

RESULTS = Path(__file__).parent / "results"


def pair(config: VisionTowerConfig, device: str = "cpu") -> tuple[VisionTower, nn.Module]:
    """Our tower and timm's model of the same shape, with the same random weights."""
    torch.manual_seed(0)
    tower = VisionTower(config)
    model = timm.create_model("eva02_large_patch14_clip_224", **config.timm_arguments())
    model.load_state_dict(tower.state_dict())
    return tower.to(device), model.to(device)


def rounds(contenders: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of each, the best of `repeats` rounds in which they take turns, after one that does not count."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def flops_per_image(config: VisionTowerConfig) -> float:
    """Floating-point operations of one image forward and backward, all patches kept: a multiply-add is two, backward
    costs twice the forward pass, norms and activations are not counted."""
    tokens, width = 1 + config.num_patches, config.width
    products = 4 * width**2 + 3 * width * config.mlp_width
    attention = 2 * tokens * width
    embedding = config.num_patches * width * 3 * config.patch**2
    return 3 * 2 * (config.layers * tokens * (products + attention) + embedding)


def machine(device: str = "cpu") -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write(name: str, figures: dict[str, Any], device: str = "cpu") -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(device), **figures}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
