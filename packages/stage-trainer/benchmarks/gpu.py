"""MFU of a training step at the paper's shape of stage 1 on one GPU, beside open_clip.

    python packages/stage-trainer/benchmarks/gpu.py            # L/14 at 224 px and 561M at 77 tokens, ten minutes
    python packages/stage-trainer/benchmarks/gpu.py --small    # small towers and batches, also on a CPU: that it runs

bfloat16 (torch.autocast; float32 on a CPU), fused AdamW, both towers trained whole, patch dropout 0.5. Operations are
the model's: forward and backward over kept patches and real tokens, nothing that is computed a second time. Without
caching at the largest batch that fits, found by doubling; with caching at eight times that, in chunks of half of it:
its ceiling is three quarters of the other's MFU, because everything is computed forward twice.

open_clip gets the same towers (peers.py) on images and captions alone, at the largest batch that fits it; ours is run
on the same task beside it. It needs open_clip_torch, sentence-transformers and timm, and is left out without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plan_memory import LARGE, SMALL, Engine, a_batch
from stage_trainer.batch import Batch
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.plan.devices import peak_flops
from stage_trainer.plan.flops import StepShape, step_flops
from stage_trainer.recipe import GradientCache
from stage_trainer.tasks.contrastive import forward_backward
from text_tower import TextTower
from vision_tower import VisionTower

TOKENS, DROPOUT = 77, 0.5


class Ours:
    """Our towers, objective and step, on their own under torch."""

    def __init__(self, towers: Any, device: torch.device, compiled: bool):
        text, self.vision = towers
        self.text = dataclasses.replace(text, compile=compiled)
        with device:
            self.model = DualEncoder(TextTower(self.text), VisionTower(self.vision))
        if compiled:
            self.model.vision.configure(compile=True)
        self.dims = tuple(text.width >> i for i in range(5))
        self.engine = Engine(self.model, self.dims, "bf16" if device.type == "cuda" else "fp32", device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, batch: Batch, tasks: tuple[str, ...], cache: GradientCache | None = None) -> None:
        forward_backward(self.engine, batch, pairs=tasks, patch_dropout=DROPOUT, cache=cache)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def batch(self, size: int, tasks: tuple[str, ...]) -> Batch:
        return a_batch(size, size if "text" in tasks else 0, TOKENS, self.vision.resolution)

    def operations(self, batch: Batch) -> int:
        shape = StepShape.of(batch, self.vision, DROPOUT)
        return step_flops(self.text, self.vision, shape, dims=self.dims).model


def seconds(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Of one run, the best of so many, after two that do not count."""
    best = float("inf")
    for turn in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn > 1:
            best = min(best, time.perf_counter() - began)
    return best


def largest(run: Callable[[int], None], sizes: list[int]) -> int:
    """The last of rising `sizes` that fits."""
    found = 0
    for size in sizes:
        try:
            run(size)
        except torch.OutOfMemoryError:
            break
        found = size
    torch.cuda.empty_cache()
    if not found:
        raise SystemExit(f"not even a batch of {sizes[0]} fits")
    return found


def measured(pairs: int, operations: int, time_of_step: float, peak: float | None) -> dict[str, Any]:
    rate = operations / time_of_step
    return {
        "pairs": pairs,
        "seconds": time_of_step,
        "pairs_per_second": pairs / time_of_step,
        "teraflops": rate / 1e12,
        "mfu": peak and rate / peak,
    }


def our_figures(ours: Ours, sizes: list[int], repeats: int, peak: float | None, name: str) -> dict[str, Any]:
    """Of both tasks at once and cached, and of images and captions alone."""
    found: dict[str, Any] = {}

    def note(title: str, size: int, tasks: tuple[str, ...], cache: GradientCache | None = None) -> None:
        batch = ours.batch(size, tasks)
        took = seconds(lambda: ours.step(batch, tasks, cache), ours.engine.device, repeats)
        found[f"{name}, {title}"] = measured(size * len(tasks), ours.operations(batch), took, peak)
        print(f"{name}, {title}", json.dumps(found[f"{name}, {title}"]), flush=True)

    for tasks in (("image_text", "text"), ("image_text",)):
        size = largest(lambda n, of=tasks: ours.step(ours.batch(n, of), of), sizes)  # type: ignore[misc]
        note(" and ".join(tasks), size, tasks)
        if "text" in tasks:
            note("both cached", 8 * size, tasks, GradientCache(size // 2, size // 2 * 3 * TOKENS))
    return found


def open_clips_step(model: DualEncoder, device: torch.device) -> Callable[[int, int], None]:
    """Its step as its training loop does it under `--precision amp_bf16`, on random images and captions."""
    from peers import OpenClip

    peer = OpenClip(model.cpu(), lambda m: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True), clip=1.0,
                    patch_dropout=DROPOUT)  # fmt: skip
    peer.model.to(device)
    optimizer = torch.optim.AdamW(peer.model.parameters(), lr=1e-5, fused=True)

    def step(size: int, resolution: int) -> None:
        images = torch.randn(size, 3, resolution, resolution, device=device)
        texts = torch.full((size, TOKENS), 5, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = peer.loss(**peer.model(images, texts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small towers, small batches")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        raise SystemExit("there is no GPU; --small shows on a CPU that the script runs")
    towers = SMALL if options.small else LARGE
    sizes = [2, 4] if options.small else [2**n for n in range(4, 13)]
    peak = peak_flops(device, "bf16")
    results: dict[str, Any] = {}

    for compiled in (False,) if options.small else (False, True):
        ours = Ours(towers, device, compiled)
        results |= our_figures(ours, sizes, options.repeats, peak, "ours, compiled" if compiled else "ours")
        del ours.optimizer, ours.engine

    try:
        step = open_clips_step(ours.model, device)
    except ImportError as missing:
        print(f"without open_clip: {missing}")
    else:
        resolution = towers[1].resolution
        size = largest(lambda n: step(n, resolution), sizes)  # type: ignore[arg-type]
        took = seconds(lambda: step(size, resolution), device, options.repeats)  # type: ignore[arg-type]
        batch = a_batch(size, 0, TOKENS, resolution)  # type: ignore[arg-type]
        results["open_clip, image_text"] = measured(size, ours.operations(batch), took, peak)
        print("open_clip", json.dumps(results["open_clip, image_text"]), flush=True)

    machine = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "peak_teraflops": peak and peak / 1e12,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    path = Path(__file__).with_name("results") / f"gpu{'-small' if options.small else ''}.json"
    if not options.small or device.type == "cuda":
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
