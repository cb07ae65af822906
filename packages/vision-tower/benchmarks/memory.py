"""Peak memory of a training step at 512 pixels, ours beside timm's, with and without activation checkpointing.

`python memory.py`: L/14, batch 1, float32 on the CPU, a fresh process for each, some five minutes; `--layers 6` takes
as many of its 24 blocks. On a GPU, `--device cuda --batch 16`, under bfloat16 autocast. `--small` for a look.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from vision_tower import VisionTowerConfig


def measure(contender: str, device: str, batch: int, layers: int, small: bool) -> dict[str, float]:
    """MiB above weights and gradients, which are there before the step."""
    torch.set_num_threads(1)
    name, checkpointing = contender.split("/")
    config = VisionTowerConfig.eva02_large(512, layers=layers, checkpointing=checkpointing == "checkpointing")
    if small:
        config = VisionTowerConfig.eva02_large(512, layers=2, width=256, heads=4, checkpointing=config.checkpointing)
    tower, model = common.pair(config, device)
    model.set_grad_checkpointing(config.checkpointing)
    network: Any = tower if name == "ours" else model
    del tower, model
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)  # ones, so that the pages are really there
    images = torch.randn(batch, 3, 512, 512, device=device)
    before = peak(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = network(images).square().mean()
    loss.backward()
    return {"before": before, "peak": peak(device), "step": peak(device) - before}


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", help="measure this contender alone, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.device, arguments.batch, arguments.layers, arguments.small)))
        return
    figures = {}
    for name in ("timm/plain", "ours/plain", "timm/checkpointing", "ours/checkpointing"):
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--one", name]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        figures[name] = {kind: round(value, 1) for kind, value in found.items()}
    shape = f"EVA02 L/14, {arguments.layers} layers, 512 px, batch {arguments.batch}"
    what = f"{shape}, MiB of one step above weights and gradients"
    suffix = "-small" if arguments.small else ""
    torch.set_num_threads(1)
    common.write(f"memory-{arguments.device}{suffix}", {"what": what, "mebibytes": figures}, arguments.device)


if __name__ == "__main__":
    main()
