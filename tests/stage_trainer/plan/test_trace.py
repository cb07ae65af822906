"""Traced memory against what the profiler counts when the same passes are really run, on a CPU."""

from dataclasses import replace

import pytest
import torch
from stage_trainer.plan.devices import DEVICES, Device
from stage_trainer.plan.target import Target
from stage_trainer.plan.trace import trace_images, trace_texts
from text_tower import PackedTokens, TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig, normalize, patch_keep_indices

CPU = Device("cpu", 2**33, 1.0, None, 1.0, None, kind="cpu")
VISION = VisionTowerConfig(resolution=64, patch=8, width=64, layers=6, heads=2)
TEXT = TextTowerConfig(vocab_size=500, width=64, layers=5, heads=2, mlp_width=256)


def peak_of(traced) -> int:
    return max(traced.forward, *(everything for everything, _ in traced.backward))


@pytest.mark.parametrize(
    ("config", "images", "dropout", "precision"),
    [
        (VISION, 24, 0.0, "fp32"),
        (VISION, 6, 0.0, "bf16"),
        (replace(VISION, checkpointing=True), 24, 0.5, "fp32"),
        (replace(VISION, layers=5, checkpointing=True), 4, 0.0, "bf16"),
        (replace(VISION, layers=1), 24, 0.0, "fp32"),
        (replace(VISION, layers=3, width=128, resolution=96), 8, 0.3, "fp32"),
    ],
)
def test_a_pass_of_images_takes_what_the_profiler_measures(profiled_peak, config, images, dropout, precision):
    tower = VisionTower(config)
    pixels = torch.zeros(images, 3, config.resolution, config.resolution, dtype=torch.uint8)
    seeds = torch.arange(images)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            keep = patch_keep_indices(seeds, config.num_patches, dropout) if dropout else None
            out = tower(normalize(pixels), keep=keep)
        out.sum().backward()
        tower.zero_grad()

    # Bytes that oneDNN takes on some Intel processors, and the plan does not know.
    scratch = 170_000 if precision == "bf16" else 0
    assert peak_of(trace_images(config, images, dropout, Target.of(CPU, precision), "all", False)) == pytest.approx(
        profiled_peak(run), rel=0.05, abs=scratch
    )


@pytest.mark.parametrize(
    ("config", "texts", "precision"),
    [
        (TEXT, 40, "fp32"),
        (TEXT, 10, "bf16"),
        (replace(TEXT, checkpointing=True, dropout=0.1, lora_rank=4, adapters=("a",)), 40, "fp32"),
        (replace(TEXT, vocab_size=40000, layers=2), 5, "fp32"),  # the word table's gradient is the largest part
    ],
)
def test_a_pass_of_texts_takes_what_the_profiler_measures(profiled_peak, config, texts, precision):
    tower = TextTower(config).train()
    packed, seeds = PackedTokens.from_lists([[5] * 24] * texts), torch.arange(texts)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = tower(packed, sample_seeds=seeds)
        out.sum().backward()
        tower.zero_grad()

    assert peak_of(trace_texts(config, texts, 24, Target.of(CPU, precision), "all", False)) == pytest.approx(
        profiled_peak(run), rel=0.05
    )


@pytest.mark.parametrize("device", [CPU, DEVICES["h100-80gb"], DEVICES["t4"]], ids=lambda d: d.name)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_depth_is_extended_exactly(monkeypatch, device, checkpointing):
    config = replace(VISION, layers=7, checkpointing=checkpointing)
    target = Target.of(device, "bf16" if device.bf16 else "fp32")
    extended = trace_images(config, 8, 0.25, target, "all", False)
    monkeypatch.setattr("stage_trainer.plan.trace.DEPTH", 7)
    walked = trace_images.__wrapped__(config, 8, 0.25, target, "all", False)
    assert (extended.forward, extended.held, extended.gradients) == (walked.forward, walked.held, walked.gradients)
    assert peak_of(extended) == pytest.approx(peak_of(walked), rel=0.01)


def test_a_gpu_is_planned_with_its_own_ways():
    """Where there is no GPU, too: its kernels keep no scores, and LayerNorm works in float32 there."""
    long = replace(VISION, resolution=160)
    gpu, cpu = (
        trace_images(long, 4, 0.0, Target.of(d, "bf16"), "all", False).held for d in (DEVICES["h100-80gb"], CPU)
    )
    scores = long.layers * 4 * long.heads * (long.num_patches + 1) ** 2 * 2
    assert cpu > gpu + scores / 2
    text = [trace_texts(TEXT, 20, 24, Target.of(d, "bf16"), "all", False).held for d in (DEVICES["h100-80gb"], CPU)]
    assert text[0] < text[1]  # a CPU's attention takes bfloat16 queries in float32


def test_towers_that_are_compiled_in_training_are_not_in_a_plan(monkeypatch):
    """The compiler takes its time, and would keep other tensors than the tower's own operators."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **options: compiled.append(options))
    target = Target.of(CPU, "bf16")
    trace_images.__wrapped__(replace(VISION, compile=True), 4, 0.0, target, "all", False)
    trace_texts.__wrapped__(replace(TEXT, compile=True), 4, 24, target, "all", False)
    assert not compiled


def test_what_does_not_learn_keeps_nothing():
    frozen = trace_images(VISION, 8, 0.0, Target.of(CPU, "fp32"), "none", False)
    assert frozen.backward == ()
    assert frozen.gradients == 0
    assert frozen.held == 8 * VISION.width * 4
    adapters = replace(TEXT, lora_rank=4, adapters=("a",))
    some, everything = (
        trace_texts(adapters, 20, 24, Target.of(CPU, "fp32"), what, False) for what in ("adapters", "all")
    )
    assert some.gradients < everything.gradients / 5


def test_gradients_that_are_there_are_added_to_one_by_one():
    fresh, again = (trace_texts(TEXT, 8, 24, Target.of(CPU, "fp32"), "all", a) for a in (False, True))
    assert all(gradients == 0 for _, gradients in again.backward)
    assert again.gradients == fresh.gradients == sum(4 * p.numel() for p in TextTower(TEXT).parameters())
