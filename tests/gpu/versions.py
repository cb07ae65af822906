"""The machine and its software; how fast it copies and multiplies, which everything else is judged by."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from report import NEEDS_CUDA, Report, run_part, seconds_of

PACKAGES = (
    "torch", "triton", "deepspeed", "transformers", "sentence-transformers", "open_clip_torch", "timm", "flash-attn",
    "xformers", "torchao", "transformer-engine", "tensorboard", "pydantic", "numpy", "pillow", "webdataset",
)  # fmt: skip


def measure(report: Report) -> None:
    report.note("packages", {name: version(name) for name in PACKAGES})
    report.note("machine", machine())
    report.note("gpu", gpu() if report.cuda else NEEDS_CUDA)
    shm = shutil.disk_usage("/dev/shm")
    report.note("shm", {"total_bytes": shm.total, "free_bytes": shm.free})
    report.note("speed", speed(report))


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "driver_clock_power": asked.stdout.strip() if asked else "no nvidia-smi",
    }


def speed(report: Report) -> dict[str, float]:
    size, rows = (2**30, 8192) if report.cuda else (2**22, 256)
    source = torch.empty(size, dtype=torch.uint8, device=report.device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), report.device, 10)["seconds"]
    a, b = (torch.randn(rows, rows, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_of(lambda: a @ b, report.device, 10)["seconds"]
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=report.cuda)
    sent = seconds_of(lambda: target[: len(host)].copy_(host), report.device, 5)["seconds"]
    return {
        "copy_bytes_per_second": 2 * size / copy,  # read and written
        "bf16_product_flops_per_second": 2 * rows**3 / product,
        "rows": rows,
        "host_to_device_bytes_per_second": len(host) / sent,
    }


if __name__ == "__main__":
    run_part(measure)
