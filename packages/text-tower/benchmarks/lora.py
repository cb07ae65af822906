"""One block with an adapter of rank 4, forward and backward: W + scale · B A formed once, against two thin products for
each token, and a block without adapters beside them, on a CPU.

    OMP_NUM_THREADS=1 python packages/text-tower/benchmarks/lora.py  # three minutes

Ratios are what carries over to other machines: `formed` and `each_token` are multiples of the block without adapters.
The three run in turn, and each counts with its fastest run, in processor time.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import SHAPES, write
from text_tower import PackedTokens, TextTowerConfig
from text_tower.attention import Attention
from text_tower.blocks import Block
from text_tower.lora import AdaptedLinear
from text_tower.packed import ByLength
from text_tower.positions import Rotary

LENGTH = 64


def block_of(shape: TextTowerConfig, adapters: tuple[str, ...]) -> Block:
    rank = 4 * len(adapters)
    config = TextTowerConfig(
        width=shape.width, heads=shape.heads, mlp_width=shape.mlp_width, lora_rank=rank, adapters=adapters
    )
    return Block(config)


def seconds(
    block: Block, x: torch.Tensor, attention: Attention, formed: bool | None, learning: str, dtype: torch.dtype
) -> float:
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(learning == "all" or "lora" in name)
    if formed is not None:
        AdaptedLinear.forms_sum = lambda *_: formed  # type: ignore[method-assign]
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = block(x, attention, 0, None)
    out.sum().backward()
    took = time.process_time() - start
    block.zero_grad()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        shape = SHAPES[name]
        plain, adapted = block_of(shape, ()), block_of(shape, ("a",))
        for tokens in options.tokens:
            layout = ByLength.of(PackedTokens.from_lists([[4] * LENGTH] * (tokens // LENGTH)))
            attention = Attention(layout, Rotary(layout.positions, shape.head_dim, shape.rope_theta), "sdpa")
            x = torch.randn(tokens, shape.width, requires_grad=True)
            for dtype in (torch.float32, torch.bfloat16):
                for learning in ("all", "adapters"):
                    ways = {"plain": (plain, None), "formed": (adapted, True), "each_token": (adapted, False)}
                    if learning == "adapters":
                        del ways["plain"]  # nothing in it learns
                    best = dict.fromkeys(ways, float("inf"))
                    for _ in range(options.repeats):
                        for way, (block, formed) in ways.items():
                            took = seconds(block, x, attention, formed, learning, dtype)
                            best[way] = min(best[way], took)
                    least = best.get("plain", best["each_token"])
                    ratios = {way: round(took / least, 3) for way, took in best.items()}
                    row = {"shape": name, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
                    rows.append({**row, "learning": learning, **ratios, "seconds": round(least, 4)})
                    print(rows[-1], flush=True)
    write("lora", {"rank": 4, "rows": rows})


if __name__ == "__main__":
    main()
