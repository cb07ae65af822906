"""Times of kernels against the roofline's formula, and against products that others have measured."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from stage_trainer.plan.devices import DEVICES, TERA, Device, alike
from stage_trainer.plan.kernels import Kernel
from stage_trainer.plan.roofline import (
    ATTENTION,
    ELEMENTWISE,
    LAUNCHES,
    MEMORY,
    PRODUCTS,
    UNALIGNED,
    kernel_seconds,
    work_seconds,
)

PLAIN = Device(
    "plain", 0, 100 * TERA, None, 10 * TERA, 1 * TERA, (9, 0), products=0.5, stream=0.5, attention=0.25, launch=5e-6
)
"""One TB/s of which half is reached, 100 TFLOP/s of which half is."""


def product(m: int, n: int, k: int, dtype: str = "bf16", size: int = 2, **more) -> Kernel:
    written = size * m * n
    return Kernel("product", size * (m * k + k * n) + written, written, 2 * m * n * k, (1, m, n, k), dtype, **more)


def test_a_large_product_takes_its_operations_and_the_writing_of_its_result():
    m, n, k = 4096, 1024, 2048
    operations, memory = kernel_seconds(product(m, n, k), PLAIN)
    assert operations == pytest.approx(2 * m * n * k / 50e12 + 2 * m * n / 0.5e12)
    assert memory == pytest.approx(2 * (m * k + k * n + m * n) / 0.5e12)
    seconds = work_seconds(Counter({product(m, n, k): 3}), replace(PLAIN, launch=0.0))
    assert seconds[PRODUCTS] == pytest.approx(3 * operations)
    assert seconds[MEMORY] == seconds[ATTENTION] == 0


def test_a_thin_product_is_bound_by_memory():
    thin = product(32768, 1024, 4)
    operations, memory = kernel_seconds(thin, replace(PLAIN, bf16=1e18))
    assert operations < memory
    seconds = work_seconds(Counter({thin: 1}), replace(PLAIN, bf16=1e18))
    assert (seconds[PRODUCTS], seconds[MEMORY]) == (0, memory)


def test_everything_else_takes_its_bytes():
    kernel = Kernel("memory", 10**9, 10**8)
    assert kernel_seconds(kernel, replace(PLAIN, kind="cpu")) == (0, 2e-3)
    assert kernel_seconds(kernel, PLAIN) == (0, 2e-3 / ELEMENTWISE)


@pytest.mark.parametrize(
    ("k", "measured"),
    [(256, 386), (512, 520), (1024, 628), (2048, 705), (4096, 736), (8192, 758), (16384, 766)],
)
def test_products_are_predicted_as_measured_on_an_h800(k, measured):
    """TFLOP/s of `[8192, k]` times `[k, 8192]` in float16: xwhzz/tilelang, benchmark/matmul/README.md. An H800 computes
    as an H100 does."""
    kernel = product(8192, 8192, k, "fp16")
    assert kernel.operations / max(kernel_seconds(kernel, DEVICES["h100-80gb"])) / TERA == pytest.approx(
        measured, rel=0.04
    )


def test_rows_that_are_not_aligned_slow_a_product_down():
    whole, broken = (kernel_seconds(product(4096, 4096, 4096, aligned=of), PLAIN)[0] for of in (True, False))
    writing = 2 * 4096**2 / 0.5e12
    assert (broken - writing) * UNALIGNED == pytest.approx(whole - writing)


def test_the_last_round_of_tiles_takes_as_long_as_a_whole_one():
    device = replace(PLAIN, cores=10, bandwidth=1e30)
    ten, eleven = (kernel_seconds(product(128 * rows, 256, 64), device)[0] for rows in (10, 11))
    assert eleven == pytest.approx(2 * ten)
    assert ten == pytest.approx(2 * 1280 * 256 * 64 / 50e12)
    few = kernel_seconds(product(128, 256, 64), device)[0]
    assert few == pytest.approx(ten), "one core works, nine do not"
    deep = kernel_seconds(product(128, 256, 5120), device)[0]
    assert deep == pytest.approx(2 * 128 * 256 * 5120 / 50e12), "they share a long inner dimension"


def test_attention_computes_whole_blocks():
    def seconds(queries, keys):
        size = 4 * queries * keys * 64 * 8
        return kernel_seconds(Kernel("attention", 1, 1, size, (8, queries, keys, 64), "bf16"), PLAIN)[0]

    assert seconds(128, 128) == pytest.approx(4 * 128 * 128 * 64 * 8 / 25e12)
    assert seconds(77, 77) == pytest.approx(seconds(128, 128))
    assert seconds(129, 129) == pytest.approx(4 * seconds(128, 128))


def test_a_gpu_waits_for_a_host_that_is_slower():
    many, few = Counter({Kernel("memory", 500): 1000}), Counter({Kernel("memory", 5 * 10**9): 1000})
    assert sum(work_seconds(many, PLAIN).values()) == pytest.approx(1000 * 5e-6)
    assert work_seconds(few, PLAIN)[LAUNCHES] == pytest.approx(1000 * 1e-6), "it works while the host issues more"
    cpu = replace(PLAIN, kind="cpu")
    assert work_seconds(few, cpu)[LAUNCHES] == pytest.approx(1000 * 5e-6), "a CPU is its own host"


@pytest.mark.parametrize("worse", [{"bandwidth": 0.5 * TERA}, {"bf16": 50 * TERA}, {"launch": 1e-3}, {"stream": 0.4}])
def test_a_slower_device_takes_longer(worse):
    work = Counter({product(4096, 1024, 1024): 3, product(4096, 1024, 4): 5, Kernel("memory", 10**8): 20})
    assert sum(work_seconds(work, replace(PLAIN, **worse)).values()) > sum(work_seconds(work, PLAIN).values())


def test_a_dtype_without_a_peak_is_computed_in_float32():
    double = kernel_seconds(product(4096, 4096, 4096, "fp8"), PLAIN)[0]
    assert double == kernel_seconds(product(4096, 4096, 4096, "fp32", size=2), PLAIN)[0]
    fast = replace(PLAIN, tf32=50 * TERA)
    kernel = product(4096, 4096, 4096, "fp32", 4)
    assert kernel_seconds(kernel, fast) == kernel_seconds(kernel, PLAIN), "TF32 is off unless it is asked for"
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        assert kernel_seconds(kernel, fast)[0] < kernel_seconds(kernel, PLAIN)[0]
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_the_table_is_plausible(device):
    assert device.timed
    assert device.link < device.bandwidth
    assert all(0.1 < share < 1 for share in (device.products, device.stream, device.attention))
    assert device.attention <= device.products
    peaks = [device.fp32, device.tf32, device.bf16, device.fp8]
    known = [peak for peak in peaks if peak]
    assert known == sorted(known), "narrower numbers are no slower"
    assert 40 <= device.cores <= 304


def test_a_device_that_is_not_listed_is_as_fast_as_the_next_older_one():
    assert alike((9, 0)).capability == (9, 0)
    assert alike((8, 7)).capability == (8, 6)
    assert alike((13, 0)).capability == (12, 0)
    assert alike((6, 1)).name == "t4"
