"""Both towers on the device against float32 on the CPU, in every library for attention, and twice for the same bits.

Bfloat16 is judged by its own error: that of the same tower in bfloat16 on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from report import NEEDS_CUDA, Report, difference, run_part
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch import Tensor, nn
from vision_tower import PackedPatches, VisionTower, VisionTowerConfig, patch_keep_indices

Run = Callable[[Any, torch.device], Tensor]
TIMES_OWN_ERROR = 3.0
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


def embed(tower: Any, run: Run, device: torch.device, in_bfloat16: bool) -> list[Tensor]:
    """Embeddings, then all gradients of a loss on them, in main memory."""
    moved = copy.deepcopy(tower).to(device).train()
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


def images(config: VisionTowerConfig) -> Run:
    rows, columns = (n * config.patch for n in config.grid)
    pixels = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))
    keep = patch_keep_indices(torch.arange(2), config.num_patches, 0.5)
    return lambda tower, device: tower(pixels.to(device), keep=keep.to(device))


def pages(config: VisionTowerConfig) -> Run:
    rows, columns = config.grid
    sizes = [(rows, columns // 2), (rows // 2, columns)]
    generator = torch.Generator().manual_seed(2)
    pixels = [torch.randn(3, h * config.patch, w * config.patch, generator=generator) for h, w in sizes]
    packed = PackedPatches.from_images(pixels, config.patch)
    return lambda tower, device: tower(packed.to(device))


def texts(config: TextTowerConfig) -> Run:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    packed = PackedTokens.from_lists(ids)
    return lambda tower, device: tower(packed.to(device))


if __name__ == "__main__":
    run_part(measure)
