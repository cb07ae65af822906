"""Kernels counted on a trace against counts by hand."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from stage_trainer.plan.devices import DEVICES, Device
from stage_trainer.plan.flops import StepShape, kept_patches, text_flops, vision_flops
from stage_trainer.plan.kernels import Kernel, fused, of_pass, one_by_one
from stage_trainer.plan.target import Target
from stage_trainer.plan.trace import LiveBytes, trace_images, trace_texts
from text_tower import TextTowerConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from vision_tower import VisionTowerConfig

CPU = Device("cpu", 2**33, 1.0, None, 1.0, None, kind="cpu")
VISION = VisionTowerConfig(resolution=64, patch=8, width=64, layers=6, heads=2, mlp_width=168)  # no row needs zeros
TEXT = TextTowerConfig(vocab_size=500, width=64, layers=5, heads=2, mlp_width=256)
H100 = Target.of(DEVICES["h100-80gb"], "bf16")
FLOAT = 4


def recorded(run, *shapes, dtype=torch.float32):
    """The tape's sections of a function of tensors of such shapes, which it does not make."""
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        live = LiveBytes(torch.device("cpu"))
        live.know(*tensors)
        with live, torch.no_grad():
            run(live, *tensors)
    return live.tape.sections


def memory(*sizes):
    return Counter(Kernel("memory", read + written, written) for read, written in sizes)


def test_an_mlp_is_counted_as_by_hand():
    m, k, n = 48, 16, 40
    (section,) = recorded(
        lambda _, x, w1, b1, w2: torch.mm(F.gelu(torch.addmm(b1, x, w1)), w2), (m, k), (k, n), (n,), (n, k)
    )
    first, gelu, second = (event.kernel for event in section)
    assert first.operations == 2 * m * k * n
    assert first.shape == (1, m, n, k)
    assert first.bytes == FLOAT * (n + m * k + k * n + m * n)
    assert gelu == Kernel("memory", FLOAT * 2 * m * n, FLOAT * m * n)
    assert second.operations == 2 * m * n * k
    assert (second.bytes, second.written) == (FLOAT * (m * n + n * k + m * k), FLOAT * m * k)


def test_views_cost_nothing_and_repeated_numbers_lie_in_memory_once():
    def run(_, x, table):
        view = x.view(6, 8, 2).transpose(0, 1)[2:]
        view.add(table.expand(6, 6, 2))

    (section,) = recorded(run, (96,), (1, 1, 2))
    assert one_by_one(section) == memory((FLOAT * (6 * 6 * 2 + 2), FLOAT * 6 * 6 * 2))


def test_of_a_table_the_rows_are_read_that_are_looked_up():
    def run(_, table):
        F.embedding(table[:5, 0].long(), table)

    (section,) = recorded(run, (1000, 4))
    assert section[-1].kernel == Kernel("memory", 8 * 5 + 2 * FLOAT * 5 * 4, FLOAT * 5 * 4)


def test_in_place_reads_what_it_changes_and_a_copy_does_not():
    (section,) = recorded(lambda _, x, y: (x.mul_(y), x.copy_(y), x.zero_()), (7,), (7,))
    assert [event.kernel.bytes for event in section] == [FLOAT * 7 * 3, FLOAT * 7 * 2, FLOAT * 7]


def test_fused_operations_read_what_comes_from_outside_and_write_what_goes_there():
    def run(live, x, y, w):
        h = (x * y + x).relu()  # one kernel
        torch.mm(h, w).sigmoid()

    m, k, n = 8, 4, 6
    sections = recorded(run, (m, k), (m, k), (k, n))
    work = fused(sections, 0)
    assert sum(one_by_one(sections[0]).values()) == 5
    products = [kernel for kernel in work if kernel.kind == "product"]
    assert len(products) == 1
    assert work - Counter(products) == memory(
        (FLOAT * 2 * m * k, FLOAT * m * k),  # x, y -> h
        (FLOAT * m * n, FLOAT * m * n),  # the sigmoid
    )


def test_what_another_section_reads_has_to_be_written():
    def run(live, x):
        h = x.exp()
        h.relu()
        live.mark()
        h.neg()

    sections = recorded(run, (10,))
    kept, dropped = fused(sections, 0), fused(sections[:1], 0)
    assert kept == memory((FLOAT * 10, 2 * FLOAT * 10))
    assert dropped == memory((FLOAT * 10, FLOAT * 10)), "without a reader nothing but the end is written"


def test_operations_without_a_tensor_in_common_stay_apart():
    sections = recorded(lambda _, x, y: (x.exp().relu(), y.exp()), (10,), (20,))
    assert fused(sections, 0) == memory((40, 40), (80, 80))


def test_a_deeper_tower_repeats_the_block_in_the_middle():
    def run(live, x):
        for operation in ("exp", "exp", "relu", "relu", "neg", "neg"):  # before, three blocks; two back
            getattr(x, operation)()
            live.mark()

    sections = recorded(run, (10,))
    first, there, back = of_pass(sections, depth=3, more=4, compiled=False)
    assert sum(there.values()) == 4 + 4
    assert first == there
    assert sum(back.values()) == 2 + 4
    assert of_pass(sections, 3, 4, True) == (first, there, back)


@pytest.mark.parametrize("target", [Target.of(CPU, "fp32"), H100], ids=["cpu", "h100"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_of_a_pass_are_those_of_the_formula(target, checkpointing):
    """`flops` counts from shapes alone, and is tested against torch's counter."""
    texts, length, images = 6, 24, 5
    text, vision = replace(TEXT, checkpointing=checkpointing), replace(VISION, checkpointing=checkpointing)
    shape = StepShape(images, kept_patches(vision, 0.5), texts, texts * length, texts * length**2)
    for traced, expected in (
        (trace_texts(text, texts, length, target, "all", False), text_flops(text, shape)),
        (trace_images(vision, images, 0.5, target, "all", False), vision_flops(vision, shape)),
    ):
        there, back = (
            sum(kernel.operations * times for kernel, times in work.items()) for work in (traced.there, traced.back)
        )
        assert there == expected.forward
        # A fused kernel makes the scores again in its backward pass, which the formula leaves out.
        again = sum(
            k.operations // 5 * n for k, n in traced.back.items() if k.kind == "attention" and backward(k, traced)
        )
        assert back - again == expected.backward + expected.recomputed


def backward(kernel: Kernel, traced) -> bool:
    """Whether a kernel of attention is not one of the forward pass, which checkpointing repeats."""
    return kernel not in traced.there


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_pass_has_the_same_products_and_less_traffic(checkpointing):
    eager, compiled = (
        trace_images(replace(VISION, compile=of, checkpointing=checkpointing), 5, 0.0, H100, "all", False)
        for of in (False, True)
    )
    assert eager.forward == compiled.forward, "memory is counted alike"
    for one, other in ((eager.there, compiled.there), (eager.back, compiled.back)):
        assert {k: n for k, n in one.items() if k.kind != "memory"} == {
            k: n for k, n in other.items() if k.kind != "memory"
        }
        assert traffic(other) < traffic(one) * 0.7
        assert sum(other.values()) < sum(one.values())


def traffic(work) -> int:
    return sum(kernel.bytes * times for kernel, times in work.items() if kernel.kind == "memory")
