"""Seconds that kernels take on a device: what bounds each is its operations or its bytes (the roofline model, Williams
et al., 2009, doi 10.1145/1498765.1498785).

A product's operations run at the rate that large ones reach on the device (`Device.products`), and its result is
written while nothing is multiplied. That agrees within 4 % with measured products of an H800 from k = 256 to 16,384
(`tests/stage_trainer/plan/test_roofline.py`). Two things lower the rate:

- tiles: a product is computed in tiles of 128 × 256 numbers, and the last round of them leaves cores without work
  (NVIDIA, "Matrix Multiplication Background"); a product of few tiles splits its inner dimension over the cores;
- rows that do not begin at multiples of 16 bytes rule out the fast kernels: 0.32 of the rate, as an H200 computed the
  2,730 of L/14's MLP (254 TFLOP/s) before its rows were filled up; 0.7 is published too (H100: 509 of some 720 TFLOP/s
  for 8193 × 2501 × 5008, pytorch-labs/float8_experimental#145; RTX 4090: 107 to 116 of 156, pytorch#181718).

A product in 8 bits with a scale for each row reaches 0.92 of that share of its own peak: 0.78 of it with one scale for
all (H100; torchao's testing/training/roofline_utils.py), and 90 to 100 % of that with one for each (pytorch#147971).

What is neither reaches half of a copy's speed on a GPU: 250 ms where the bytes of an eager step of both towers alone
would take 132, and 101 of a compiled one, where they would take 53 (the kernels' own times on the H200). Reductions
over tokens, rows of odd widths and 16-bit numbers that lie apart are slow.

Attention computes whole blocks of 128 queries and 128 keys, as flash-attn 2 does for heads of up to 64 channels.
"""

from __future__ import annotations

import math

import torch

from stage_trainer.plan.devices import Device
from stage_trainer.plan.kernels import Kernel, Work

Seconds = dict[str, float]
"""By part: what takes the time."""

PRODUCTS, ATTENTION, MEMORY, LAUNCHES = "matrix products", "attention", "memory-bound operations", "launches"

TILE = 128, 256
SMALLEST_SPLIT = 512  # of the inner dimension, that one core computes
UNALIGNED = 0.32
FP8 = 0.92
ELEMENTWISE = 0.5  # of a copy's speed
BLOCK = 128
GAP = 1e-6  # between two kernels: 3.8 µs a launch of kernels of 2.9 (NVIDIA, "Getting Started with CUDA Graphs")


def work_seconds(work: Work, device: Device) -> Seconds:
    """Of kernels that follow one another; a GPU waits where the host cannot issue them as fast as it computes.

    Args:
        work: kernels, and how often each runs.
        device: with `timed`.
    """
    found = dict.fromkeys((PRODUCTS, ATTENTION, MEMORY), 0.0)
    for kernel, times in work.items():
        operations, memory = kernel_seconds(kernel, device)
        if kernel.kind == "product" and operations > 0:
            part = PRODUCTS if operations >= memory else MEMORY
        else:
            part = ATTENTION if kernel.kind == "attention" else MEMORY
        found[part] += times * max(operations, memory)
    launches = sum(work.values())
    if device.kind == "cpu":  # whoever issues an operation computes it, too
        return {**found, LAUNCHES: launches * device.launch}
    busy = sum(found.values()) + launches * GAP
    return {**found, LAUNCHES: launches * GAP + max(0.0, launches * device.launch - busy)}


def kernel_seconds(kernel: Kernel, device: Device) -> tuple[float, float]:
    """(by its operations, by its bytes); the greater one is what it takes."""
    assert device.bandwidth is not None
    speed = device.bandwidth * device.stream
    memory = kernel.bytes / speed
    if kernel.kind == "memory":
        return 0.0, memory if device.kind == "cpu" else memory / ELEMENTWISE
    peak = _peak(device, kernel.dtype)
    if kernel.kind == "attention":
        return _whole_blocks(kernel, device) / (peak * device.attention), memory
    rate = peak * device.products * _filled(kernel, device) * (1.0 if kernel.aligned else UNALIGNED)
    rate *= FP8 if kernel.dtype == "fp8" and device.fp8 else 1.0
    writing = 0.0 if device.kind == "cpu" else kernel.written / speed
    return kernel.operations / rate + writing, memory


def _peak(device: Device, dtype: str) -> float:
    """Operations a second; what a device does not have natively it computes in float32."""
    of_dtype = {"bf16": device.bf16, "fp16": device.fp16, "fp8": device.fp8}.get(dtype)
    tf32 = device.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else None
    found = of_dtype or (tf32 if dtype == "fp32" else None) or device.fp32
    assert found is not None
    return found


def _filled(kernel: Kernel, device: Device) -> float:
    """Share of a product's time in which its cores compute what is asked for."""
    if not device.cores:
        return 1.0
    batch, m, n, k = kernel.shape
    # Either side may be the longer one of a tile.
    tiles = min(math.ceil(m / a) * math.ceil(n / b) for a, b in (TILE, TILE[::-1])) * batch
    splits = min(max(1, device.cores // tiles), max(1, k // SMALLEST_SPLIT))
    rounds = math.ceil(tiles * splits / device.cores)
    return batch * m * n / (TILE[0] * TILE[1]) * splits / (rounds * device.cores)


def _whole_blocks(kernel: Kernel, device: Device) -> float:
    if device.kind == "cpu":
        return kernel.operations
    _, queries, keys, _ = kernel.shape
    padded = math.ceil(queries / BLOCK) * BLOCK * math.ceil(keys / BLOCK) * BLOCK
    return kernel.operations * padded / (queries * keys)
