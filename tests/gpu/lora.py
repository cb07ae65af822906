"""LoRA of rank 4 on one chunk of texts: two thin products for each token, or W + s·B·A formed once; against no adapter.

Each Linear of a block by its formula, and, where the tower has both ways (`AdaptedLinear.forms_sum`), the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from report import Report, run_part, seconds_of
from text_tower import PackedTokens, TextTower, TextTowerConfig
from text_tower.lora import AdaptedLinear

RANK, SCALE = 4, 1.0


def measure(report: Report) -> None:
    config = TextTowerConfig(vocab_size=8192, layers=6, lora_rank=RANK, lora_alpha=4.0, adapters=("a",))
    texts, length, repeats = (212, 77, 10) if report.cuda else (16, 8, 1)
    if not report.cuda:
        config = replace(config, vocab_size=128, width=64, layers=2, heads=2, mlp_width=128)
    width, hidden = config.width, config.mlp_width
    report.note("settings", {"tokens": texts * length, "rank": RANK, "layers": config.layers})
    for name, out, into in (("qkv", 3 * width, width), ("out", width, width), ("up", hidden, width),
                            ("down", width, hidden)):  # fmt: skip
        report.note(f"{name}, {into} to {out}", formulas(report, texts * length, out, into, repeats))
    tower = TextTower(config).to(report.device).train()
    packed = PackedTokens.from_lists([[5] * length] * texts).to(report.device)
    found: dict[str, Any] = {}
    for name, adapter, formed in (("no adapter", "none", False), ("each token", "a", False), ("formed", "a", True)):
        with mock.patch.object(AdaptedLinear, "forms_sum", lambda *_, formed=formed: formed):
            run = partial(backward, partial(tower, packed, adapter=adapter), tower.parameters, report)
            found[name] = seconds_of(run, report.device, repeats)
    report.note("tower", found)


def formulas(report: Report, tokens: int, out: int, into: int, repeats: int) -> dict[str, Any]:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=report.device).mul_(0.02).requires_grad_()

    x, weight, a, b = leaf(tokens, into), leaf(out, into), leaf(RANK, into), leaf(out, RANK)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "no adapter": lambda: F.linear(x, weight),
        "each token": lambda: torch.add(F.linear(x, weight), F.linear(F.linear(x, a), b), alpha=SCALE),
        "formed": lambda: F.linear(x, torch.add(weight, b.float() @ a.float(), alpha=SCALE)),
    }
    leaves = (x, weight, a, b)
    return {
        name: seconds_of(partial(backward, way, lambda: leaves, report), report.device, repeats)
        for name, way in ways.items()
    }


def backward(run: Callable[[], torch.Tensor], leaves: Callable[[], Any], report: Report) -> None:
    with torch.autocast(report.device.type, torch.bfloat16, enabled=report.cuda):
        out = run()
    out.float().square().mean().backward()
    for leaf in leaves():
        leaf.grad = None


if __name__ == "__main__":
    run_part(measure)
