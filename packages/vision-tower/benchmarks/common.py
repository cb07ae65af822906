"""What the benchmarks share: the two models with one set of weights, and the results file."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from vision_tower import VisionTower, VisionTowerConfig

RESULTS = Path(__file__).parent / "results"


def pair(config: VisionTowerConfig, device: str = "cpu") -> tuple[VisionTower, Eva]:
    """Our tower and timm's model of the same shape, with the same random weights."""
    torch.manual_seed(0)
    tower = VisionTower(config)
    model = timm.create_model("eva02_large_patch14_clip_224", **config.timm_arguments())
    assert isinstance(model, Eva)
    model.load_state_dict(tower.state_dict())
    return tower.to(device), model.to(device)


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
