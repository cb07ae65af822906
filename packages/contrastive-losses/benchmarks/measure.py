"""What the benchmarks share: a training step of a loss, its time and its peak memory, the machine, the results file."""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from losses import LOSSES

RESULTS = Path(__file__).with_name("results")


def draw(rows: int, width: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, targets that are like their queries, and a temperature; all want gradients."""
    generator = torch.Generator().manual_seed(0)
    queries, noise = (torch.randn(rows, width, generator=generator) for _ in range(2))
    tensors = [queries, noise.add_(queries, alpha=0.5)]
    return [
        *(tensor.to(device, dtype).requires_grad_() for tensor in tensors),
        torch.tensor([0.05], device=device, requires_grad=True),
    ]


def step(name: str, inputs: list[torch.Tensor], dims: tuple[int, ...]) -> torch.Tensor:
    """Forward and backward; returns the loss, which a GPU may still be computing."""
    queries, targets, temperature = inputs
    for tensor in inputs:
        tensor.grad = None
    with torch.autocast(inputs[0].device.type, inputs[0].dtype, enabled=inputs[0].dtype != torch.float32):
        loss = LOSSES[name](queries, targets, temperature, dims)
    loss.backward()
    return loss.detach()


def seconds_of(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(
    names: list[str], inputs: list[torch.Tensor], dims: tuple[int, ...], repeats: int
) -> dict[str, float]:
    """The losses take turns, so that a slow moment of the machine meets all of them."""
    for name in names:
        step(name, [tensor[:64].detach().requires_grad_() for tensor in inputs], dims)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            times[name].append(seconds_of(partial(step, name, inputs, dims)))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes_on_cpu(name: str, rows: int, width: int, dims: tuple[int, ...]) -> int:
    """Peak resident memory of one step above that of a process which holds the inputs, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (name, rows, width, dims))


def _peak_bytes(name: str, rows: int, width: int, dims: tuple[int, ...]) -> int:
    torch.set_num_threads(1)
    step(name, draw(64, width, "cpu", torch.float32), dims)  # loads what a first call loads
    inputs = draw(rows, width, "cpu", torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = resident("VmRSS")
    step(name, inputs, dims)
    return max(resident("VmHWM") - before, 1)  # a small batch fits into memory that was freed before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def machine(device: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {name: _version(name) for name in ("torch", "triton", "sentence-transformers", "open_clip_torch")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write(path: Path, device: str, settings: dict[str, Any], results: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")
