"""This machine's constants for the planner, and predicted beside measured: products by shape, then whole steps.

    python packages/stage-trainer/benchmarks/roofline.py             # small towers on one CPU core, three minutes
    python packages/stage-trainer/benchmarks/roofline.py --large     # L/14 and 561M, on a GPU

Measured first is what `plan.devices` has a column for: large products, copies, fused attention, operations issued by
the host. On a GPU they stand beside the table's; on a CPU, which the table lacks, they are what the predictions rest
on, with copies of the size of these towers' activations, since its caches hold those. Each figure is the best of
several; on a CPU, of one core's own time, since others may use the machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plan_memory import CASES, LARGE, SMALL, Case, step_of
from stage_trainer.plan.devices import DEVICES, Device, present
from stage_trainer.plan.kernels import Kernel
from stage_trainer.plan.roofline import kernel_seconds
from stage_trainer.plan.step import predict
from text_tower import TextTowerConfig
from vision_tower import VisionTowerConfig

REPEATS = 7
SHAPES = {  # (m, n, k)
    "cuda": {
        "large": (8192, 8192, 8192), "text MLP": (16384, 4096, 1024), "text projection": (16384, 1024, 1024),
        "image MLP, rows not aligned": (33024, 2730, 1024), "weight gradient": (4096, 1024, 16384),
        "adapter": (16384, 4, 1024),
    },
    "cpu": {
        "large": (1024, 1024, 1024), "text MLP": (4608, 512, 128), "text projection": (4608, 128, 128),
        "weight gradient": (512, 128, 4608), "adapter": (4608, 4, 128),
    },
}  # fmt: skip


def best(run: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Seconds of one call, of which `times` are made in a row."""
    found, clock = float("inf"), time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = clock()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found = min(found, (clock() - began) / times)
    return found


def measured_device(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations, bytes and launches a second, as `Device` has them."""
    gpu = device.type == "cuda"
    m, n, k = SHAPES[device.type]["large"]
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    numbers = torch.randn(2**28 if gpu else 2**19, device=device)
    out = torch.empty_like(numbers)
    q = torch.randn(
        256 if gpu else 64, 16 if gpu else 4, 257 if gpu else 64, 64 if gpu else 32, device=device, dtype=dtype
    )
    small = torch.zeros(1, device=device, requires_grad=True)
    launches = 200

    def issue() -> None:
        result = small
        for _ in range(launches):
            result = result * 1.0
        result.backward()

    return {
        "products": 2 * m * n * k / best(lambda: a @ b, device),
        "stream": 2 * numbers.nbytes / best(lambda: out.copy_(numbers), device, 10),
        "attention": 4 * q.numel() * q.shape[2] / best(lambda: F.scaled_dot_product_attention(q, q, q), device),
        "launch": best(issue, device) / (2 * launches),
    }


def planned_with(device: torch.device, found: dict[str, float]) -> Device:
    if device.type == "cuda":
        return replace(present(device) or DEVICES["h100-80gb"], capability=torch.cuda.get_device_capability(device))
    return Device(
        "cpu", 0, None, None, found["products"], found["stream"], kind="cpu",
        products=1.0, stream=1.0, attention=found["attention"] / found["products"], launch=found["launch"],
    )  # fmt: skip


def products(device: torch.device, dtype: torch.dtype, with_: Device) -> dict[str, Any]:
    result = {}
    for name, (m, n, k) in SHAPES[device.type].items():
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        size = a.element_size()
        written = size * m * n
        kernel = Kernel(
            "product", size * (m * k + k * n) + written, written, 2 * m * n * k, (1, m, n, k),
            "bf16" if dtype == torch.bfloat16 else "fp32", all(side * size % 16 == 0 for side in (n, k)),
        )  # fmt: skip
        took, expected = best(partial(torch.matmul, a, b), device), max(kernel_seconds(kernel, with_))
        result[name] = {
            "shape": (m, n, k),
            "measured_gigaflops": round(kernel.operations / took / 1e9, 1),
            "predicted_gigaflops": round(kernel.operations / expected / 1e9, 1),
        }
        print(name, json.dumps(result[name]), flush=True)
    return result


def step(
    towers: tuple[TextTowerConfig, VisionTowerConfig], case: Case, device: torch.device, precision: str, with_: Device
) -> dict[str, Any]:
    whole = step_of(towers, case, precision, device, fused=True)
    measured = best(whole.run, device)
    predicted = predict(whole.model, whole.sizes, whole.setting, with_, None)
    assert predicted is not None
    result = {
        **whole.about, "measured_seconds": round(measured, 4),
        "predicted_seconds": round(predicted.total, 4), "measured_to_predicted": round(measured / predicted.total, 2),
        "parts": {name: round(seconds, 4) for name, seconds in predicted.parts if seconds},
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="L/14 and 561M instead of small towers")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    name = "large" if options.large else "small"
    torch.set_num_threads(1)
    found = measured_device(device, dtype)
    with_ = planned_with(device, found)
    print(json.dumps(found), flush=True)
    by_shape = products(device, dtype, with_)
    steps = [step(LARGE if options.large else SMALL, case, device, precision, with_) for case in CASES[name]]
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    table = {"products": with_.peak(precision), "bandwidth": with_.bandwidth, "launch": with_.launch}
    result = {"machine": machine, "device": found, "table": table, "products": by_shape, "steps": steps}
    path = Path(__file__).with_name("results") / f"roofline-{device.type}-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    worst = max((each["measured_to_predicted"] for each in steps), key=lambda ratio: abs(ratio - 1))
    print(f"furthest off: {worst:.2f} of what was predicted; written: {path}")


if __name__ == "__main__":
    main()
