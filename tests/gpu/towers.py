"""Both towers on the device against float32 on the CPU, in every library for attention, and twice for the same bits.
What a residual stream in 16 bits, blocks in FP8, weights that are cast once for several passes, and uploads on a stream
of their own change.

Bfloat16 is judged by its own error: that of the same tower in bfloat16 on the CPU; FP8 by that of FP8 emulated there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from report import NEEDS_CUDA, Report, difference, peak_of, run_part, seconds_of
from stage_trainer.batch import Part
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.engine.float8 import in_float8
from stage_trainer.engine.upload import Uploader
from stage_trainer.errors import UserError
from stage_trainer.run.device import check_fp8
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch import Tensor, nn
from vision_tower import PackedPatches, VisionTower, VisionTowerConfig, patch_keep_indices

Run = Callable[[Any, torch.device], Tensor]
TIMES_OWN_ERROR = 3.0
TIMES_EMULATED = 1.5
ROUNDING = 2.0**-8  # of bfloat16
PASSES = 4
FLOAT32_ERROR = 1e-3
LENGTHS = (3, 8, 8, 20, 33, 60)


def measure(report: Report) -> None:
    vision = VisionTowerConfig.eva02_large(224)
    text = TextTowerConfig(vocab_size=8192, lora_rank=4, lora_alpha=4.0, adapters=("retrieval.query",))
    if not report.cuda:
        vision = replace(vision, layers=2, width=64, heads=2, mlp_width=170, resolution=56)
        text = replace(text, vocab_size=128, width=64, layers=2, heads=2, mlp_width=128)
    kinds: dict[str, tuple[nn.Module, Run, tuple[str, ...]]] = {
        "vision": (VisionTower(vision), images(vision), ("sdpa", "xformers", "flash-attn")),
        "vision, packed": (VisionTower(vision), pages(vision), ("sdpa", "xformers", "flash-attn")),
        "text": (TextTower(text), texts(text), ("sdpa", "varlen", "xformers", "flash-attn")),
    }
    for name, (tower, run, backends) in kinds.items():
        tower.configure(attention="sdpa")  # type: ignore[operator]
        cpu = torch.device("cpu")
        expected, own = embed(tower, run, cpu, False), embed(tower, run, cpu, True)
        errors = compared(own, expected)
        report.note(f"{name}: bfloat16 on the CPU", errors)
        in_float = embed(tower, run, report.device, False)
        report.note(f"{name}: float32, sdpa", found := compared(in_float, expected))
        report.check(max(found.values()) < FLOAT32_ERROR, f"{name}: float32 is off by {max(found.values()):.1e}")
        for backend in backends:
            run_it = partial(of_backend, report, f"{name}, {backend}", (tower, run), backend, expected, errors)
            figures: Any = NEEDS_CUDA
            if backend == "sdpa" or report.cuda:  # the towers say what is missing
                figures = report.tried(f"{name}, {backend}", run_it, absent=(ImportError, ValueError))
            report.note(f"{name}: bfloat16, {backend}", figures)
        tower.configure(attention="sdpa", residual_in_fp32=False)  # type: ignore[operator]
        found = compared(embed(tower, run, report.device, True), expected)
        report.note(f"{name}: bfloat16, residual in 16 bits", found)
        rounded = ROUNDING * (2 * len(blocks_of(tower))) ** 0.5  # after attention and after the MLP of each block
        for what, error in found.items():
            limit = TIMES_OWN_ERROR * errors[what] + rounded
            report.check(error < limit, f"{name}, residual in 16 bits: {what} are off by {error:.1e} of {limit:.1e}")
        tower.configure(residual_in_fp32=True)  # type: ignore[operator]
        in_8_bits = partial(of_float8, report, name, (tower, run), expected)
        report.note(f"{name}: FP8", report.tried(f"{name}, FP8", in_8_bits, absent=(UserError,)))
    chunks: dict[str, tuple[nn.Module, Run]] = {
        "vision": (VisionTower(vision), images(vision, 64 if report.cuda else 2)),
        "text": (TextTower(text), texts(text, LENGTHS * (20 if report.cuda else 1))),
    }
    for name, (tower, run) in chunks.items():
        tower.to(report.device).train()
        report.tried(f"{name}, on and off", partial(on_and_off, report, name, tower, run))
    report.note("uploads", report.tried("uploads", partial(uploads, report)) if report.cuda else NEEDS_CUDA)


def blocks_of(tower: Any) -> nn.ModuleList:
    blocks: nn.ModuleList = tower.blocks if isinstance(tower, VisionTower) else tower.encoder.layers
    return blocks


def on_and_off(report: Report, name: str, tower: Any, run: Run) -> None:
    """Time and memory of some passes of an eager tower in bfloat16, with each of two settings and without it."""
    repeats = 5 if report.cuda else 1

    def passes(once: bool) -> None:
        with cast_once(tower) if once else nullcontext():
            for _ in range(PASSES):
                with torch.autocast(report.device.type, torch.bfloat16):
                    out = run(tower, report.device)
                out.square().sum().backward()

    gradients: dict[bool, list[Tensor]] = {}
    for in_fp32, once in ((True, False), (True, True), (False, True)):
        tower.configure(residual_in_fp32=in_fp32)
        tower.zero_grad()
        passes(once)
        if in_fp32:
            gradients[once] = [p.grad.cpu() for p in tower.parameters() if p.grad is not None]
        figures = {"passes": PASSES, **seconds_of(partial(passes, once), report.device, repeats, 1)}
        figures["peak_bytes"] = peak_of(partial(passes, once), report.device)
        title = "residual in float32" if in_fp32 else "residual in 16 bits"
        report.note(f"{name}: {title}, weights cast {'once' if once else 'in each pass'}", figures)
    same = all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    report.check(same, f"{name}: weights that are cast once have other gradients than those that each pass casts")


def uploads(report: Report) -> dict[str, Any]:
    """256 images from pageable memory in turn, and as a step uploads them."""
    pixels, seeds = torch.zeros(256, 3, 224, 224, dtype=torch.uint8), torch.arange(256)
    upload = Uploader(report.device)
    ways: dict[str, Callable[[], Any]] = {
        "in turn": lambda: (pixels.to(report.device), seeds.to(report.device)),
        "pinned, on a stream of their own": lambda: upload(Part(pixels, seeds, None, seeds)),
    }
    return {"bytes": pixels.nbytes, **{name: seconds_of(way, report.device, 5, 2) for name, way in ways.items()}}


def of_backend(
    report: Report,
    name: str,
    contender: tuple[Any, Run],
    backend: str,
    expected: list[Tensor],
    own: dict[str, float],
) -> dict[str, Any]:
    """Errors, and whether a second run gives the same bits."""
    tower, run = contender
    tower.configure(attention=backend)
    first = embed(tower, run, report.device, True)
    errors = compared(first, expected)
    again = embed(tower, run, report.device, True)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for what, error in errors.items():
        limit = TIMES_OWN_ERROR * own[what] + 1e-4
        report.check(error < limit, f"{name}: {what} are off by {error:.1e}, more than {limit:.1e}")
    # PyTorch's varlen attention adds up the gradients of a page's queries by atomics; flash-attn does so too.
    report.check(same or "packed" in name, f"{name}: two runs differ")
    return {**errors, "same_bits_twice": same}


def of_float8(report: Report, name: str, contender: tuple[Any, Run], expected: list[Tensor]) -> dict[str, Any]:
    """Errors, those of emulating it on the CPU, and whether a second run gives the same bits."""
    check_fp8(True if report.cuda else "emulate", "bf16", report.device)
    tower, run = contender
    own = compared(embed(tower, run, torch.device("cpu"), True, fp8=True), expected)
    first, again = (embed(tower, run, report.device, True, fp8=True) for _ in range(2))
    errors = compared(first, expected)
    for what, error in errors.items():
        limit = TIMES_EMULATED * own[what]
        report.check(error < limit, f"{name}, FP8: {what} are off by {error:.1e}, more than {limit:.1e}")
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    report.check(same or "packed" in name, f"{name}: two runs in FP8 differ")
    return {**errors, "same_bits_twice": same, "emulated_on_the_cpu": own}


def embed(tower: Any, run: Run, device: torch.device, in_bfloat16: bool, fp8: bool = False) -> list[Tensor]:
    """Embeddings, then all gradients of a loss on them, in main memory."""
    moved = copy.deepcopy(tower).to(device).train()
    with in_float8(moved) if fp8 else nullcontext():
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            embeddings = run(moved, device)
        aim = torch.linspace(-1, 1, embeddings.numel(), device=device).view_as(embeddings).sin()
        (embeddings * aim).sum().backward()
    return [embeddings.detach().cpu(), *(p.grad.cpu() for p in moved.parameters() if p.grad is not None)]


def compared(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative errors; that of the gradients is of all of them as one vector."""
    off, size = (torch.tensor(norms(*both)).norm() for both in ((found[1:], expected[1:]), (expected[1:],)))
    return {"embeddings": difference(found[0], expected[0]), "gradients": float(off / size)}


def norms(left: list[Tensor], right: list[Tensor] | None = None) -> list[float]:
    """Of each difference, in float64."""
    differences = left if right is None else [a - b for a, b in zip(left, right, strict=True)]
    return [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in differences]


def images(config: VisionTowerConfig, count: int = 2) -> Run:
    rows, columns = (n * config.patch for n in config.grid)
    pixels = torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(1))
    keep = patch_keep_indices(torch.arange(count), config.num_patches, 0.5)
    return lambda tower, device: tower(pixels.to(device), keep=keep.to(device))


def pages(config: VisionTowerConfig) -> Run:
    rows, columns = config.grid
    sizes = [(rows, columns // 2), (rows // 2, columns)]
    generator = torch.Generator().manual_seed(2)
    pixels = [torch.randn(3, h * config.patch, w * config.patch, generator=generator) for h, w in sizes]
    packed = PackedPatches.from_images(pixels, config.patch)
    return lambda tower, device: tower(packed.to(device))


def texts(config: TextTowerConfig, lengths: tuple[int, ...] = LENGTHS) -> Run:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    packed = PackedTokens.from_lists(ids)
    return lambda tower, device: tower(packed.to(device))


if __name__ == "__main__":
    run_part(measure)
