"""What the time of one chunk of each tower goes to: the kernels of a forward and backward pass, by their own time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from report import Report, run_part, wait
from shapes import Rank
from torch.profiler import ProfilerActivity, profile

MOST = 25


def measure(report: Report) -> None:
    rank = Rank.start(report)
    part = rank.batch(1)
    assert part.images is not None
    assert part.texts is not None
    runs = {
        "image_tower": partial(images, rank, part.images.to(report.device), part.image_seeds.to(report.device)),
        "text_tower": partial(texts, rank, part.texts.to(report.device)),
    }
    for name, run in runs.items():
        for compiled in (False, True):
            rank.configure(checkpointing=False, compiled=compiled)
            run()
            run()
            report.note(f"{name}, {'compiled' if compiled else 'eager'}", of_run(run, report))


def images(rank: Rank, pixels: torch.Tensor, seeds: torch.Tensor) -> None:
    from vision_tower import patch_keep_indices

    vision, dropout = rank.model.vision, rank.recipe.stage(1).patch_dropout_at(0)
    keep = patch_keep_indices(seeds, vision.config.num_patches, dropout)
    backward(rank, lambda: vision(vision.normalize(pixels), keep=keep))


def texts(rank: Rank, packed: Any) -> None:
    backward(rank, lambda: rank.model.text(packed))


def backward(rank: Rank, run: Callable[[], torch.Tensor]) -> None:
    with torch.autocast(rank.engine.device.type, torch.bfloat16, enabled=rank.recipe.precision == "bf16"):
        embeddings = run()
    embeddings.square().mean().backward()
    for parameter in rank.model.parameters():
        parameter.grad = None


def of_run(run: Callable[[], None], report: Report) -> dict[str, Any]:
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if report.cuda else [])]
    with profile(activities=kinds) as record:
        run()
        wait(report.device)
    name = f"self_{'device' if report.cuda else 'cpu'}_time_total"
    times = [(getattr(event, name) / 1e6, event) for event in record.key_averages()]
    # On a GPU operators and kernels both stand in the list; a kernel's time is its own.
    own = [(took, e) for took, e in times if took > 0 and (not report.cuda or "CUDA" in str(e.device_type))]
    total = sum(took for took, _ in own)
    own.sort(key=lambda each: -each[0])
    top = [{"name": e.key[:120], "calls": e.count, "seconds": took, "share": took / total} for took, e in own[:MOST]]
    return {"seconds": total, "kernels": sum(e.count for _, e in own), "top": top}


if __name__ == "__main__":
    run_part(measure)
