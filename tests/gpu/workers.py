"""Processes that load data, started after CUDA has begun: they bring the batches that one process makes by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import drawn
import torch
from report import NEEDS_CUDA, Report, run_part, wait
from stage_trainer.build import load_tokenizer
from stage_trainer.run.loader import batches
from stage_trainer.tasks import make_task

STEPS = 6


def measure(report: Report) -> None:
    workers = 4 if report.cuda else 2
    recipe = drawn.recipe_of("workers", report.cuda, f"steps={STEPS}", "resolution=[[0, 32]]", "warmup_steps=0")
    data = make_task(recipe, 1).make_batches(load_tokenizer(recipe), 0, 1)
    torch.ones(1, device=report.device).sum().item()
    report.note("begun before the workers", "CUDA" if torch.cuda.is_initialized() else NEEDS_CUDA)
    brought: dict[int, list[dict[str, Any]]] = {}
    for count in (0, workers):
        began = time.perf_counter()
        with contextlib.closing(batches(data, 0, STEPS, count)) as loader:
            # Moved, as a step does it: what comes from shared memory has to reach the device.
            brought[count] = [tensors(batch.to(report.device)) for batch, _ in loader]
        wait(report.device)
        report.note(f"{count} workers", {"batches": len(brought[count]), "seconds": time.perf_counter() - began})
    same = len(brought[0]) == len(brought[workers]) and all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in zip(brought[0], brought[workers], strict=False)
    )
    report.note("same batches", same)
    report.check(same, "workers bring other batches than this process makes")


def tensors(part: Any) -> dict[str, Any]:
    found = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    found |= {"ids": part.texts.ids, "cu_seqlens": part.texts.cu_seqlens}
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


if __name__ == "__main__":
    run_part(measure)
