"""L/14 at 224 pixels in bfloat16 on a GPU: timm eager and compiled, ours eager and compiled, patch dropout, attention
libraries, and pages at their native aspect. `python gpu.py`; `python gpu.py --device cpu --small` shows that it runs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import torch
from vision_tower import PackedPatches, VisionTower, VisionTowerConfig, patch_keep_indices
from vision_tower.attention import choose_backend

# Dense bfloat16, operations a second, by the makers' data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_of(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((value for key, value in PEAKS.items() if key in name), None)


def training_step(network: Any, images: Any, device: str, **options: Any) -> Callable[[], None]:
    def step() -> None:
        network.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            embeddings = network(images, **options)
        embeddings.float().square().mean().backward()

    return step


def configured(tower: VisionTower, **settings: Any) -> VisionTower:
    other = copy.deepcopy(tower)
    other.configure(**settings)
    return other


def available(name: str, device: str) -> bool:
    try:
        choose_backend(name, torch.device(device))
    except (ImportError, ValueError) as reason:
        print(f"without {name}: {reason}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device, batch, repeats = arguments.device, arguments.batch, arguments.repeats
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; `--device cpu --small` shows that this runs")
    config = VisionTowerConfig.eva02_large()
    if arguments.small:
        config, batch, repeats = replace(config, layers=2, width=128, heads=2, mlp_width=340, resolution=56), 4, 1
    torch.set_float32_matmul_precision("high")
    tower, model = common.pair(config, device)
    side = config.grid[0] * config.patch
    images = torch.randn(batch, 3, side, side, device=device)
    keep = patch_keep_indices(torch.arange(batch, device=device), config.num_patches, 0.5)

    contenders = {
        "timm eager": training_step(model, images, device),
        "timm compiled": training_step(torch.compile(copy.deepcopy(model)), images, device),
        "ours eager": training_step(tower, images, device),
        "ours compiled": training_step(configured(tower, compile=True), images, device),
        "ours eager, patch dropout 0.5": training_step(tower, images, device, keep=keep),
        "ours compiled, patch dropout 0.5": training_step(configured(tower, compile=True), images, device, keep=keep),
    }
    # Pages of one size in patches, half upright and half lying: packed, beside squares of the same number of patches.
    rows, columns = config.grid[0] * 2, config.grid[1] // 2
    sizes = [(rows, columns), (columns, rows)] * (batch // 2)
    pages = [torch.randn(3, h * config.patch, w * config.patch, device=device) for h, w in sizes]
    contenders["ours eager, packed pages"] = training_step(
        tower, PackedPatches.from_images(pages, config.patch), device
    )
    for name in ("xformers", "flash-attn"):
        if available(name, device):
            other = configured(tower, attention=name)
            contenders[f"ours eager, {name}"] = training_step(other, images, device)
            contenders[f"ours compiled, {name}"] = training_step(configured(other, compile=True), images, device)

    seconds = common.rounds(contenders, repeats, device)
    work, peak = batch * common.flops_per_image(config), peak_of(device)
    figures = {
        name: {
            "seconds": value,
            "images_a_second": batch / value,
            "times_timm_eager": seconds["timm eager"] / value,
            "times_timm_compiled": seconds["timm compiled"] / value,
            # Of the plain model's operations: what patch dropout leaves out is no work, and is not counted here.
            "mfu": work / value / peak if peak and "dropout" not in name else None,
        }
        for name, value in seconds.items()
    }
    what = f"EVA02, {config.layers} layers of {config.width}, {side} px, batch {batch}, bfloat16 autocast"
    name = f"{'gpu' if device == 'cuda' else 'gpu-script-on-cpu'}{'-small' if arguments.small else ''}"
    common.write(name, {"what": f"{what}, forward and backward", "contenders": figures}, device)


if __name__ == "__main__":
    main()
