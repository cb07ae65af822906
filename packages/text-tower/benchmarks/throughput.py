"""Training throughput at 77, 512 and 8,192 tokens beside transformers' padded SDPA and FlashAttention.

    python packages/text-tower/benchmarks/throughput.py                   # on a GPU: bfloat16, the published shape
    python packages/text-tower/benchmarks/throughput.py --small           # anywhere, in a small shape

Texts have mixed lengths, log-normal and cut to the length in question, as a batch of a training stage has; tokens per
second count real tokens only. MFU counts the multiplications that real tokens need (6 × parameters of the blocks ×
tokens, and 12 × width × the sum of squared lengths × layers for attention), over what the device can do in bfloat16.
FlashAttention in transformers runs where flash-attn is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import time

import torch
from common import SHAPES, batch, log_normal_lengths, pair, run_ours, run_theirs, write
from text_tower.attention import choose_backend

# Dense bfloat16 peak in FLOP/s, from the vendor's data sheets; matched by the beginning of the device's name.
PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12, "NVIDIA L4": 121e12}


def flops(config, lengths: list[int]) -> float:
    """Forward and backward, for real tokens; the frozen table is a look-up."""
    blocks = config.layers * (4 * config.width**2 + 2 * config.width * config.mlp_width)
    return 6.0 * blocks * sum(lengths) + 12.0 * config.layers * config.width * sum(n * n for n in lengths)


def seconds(run, module, repeats: int, device: str) -> float:
    """Median time of a forward and backward pass."""
    times = []
    for _ in range(repeats + 2):  # two to warm up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embeddings = run()
        embeddings.square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        module.zero_grad()
    return sorted(times[2:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small shape and few tokens")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 77 512 8192; small: 77 512")
    parser.add_argument("--tokens", type=int, default=65536, help="about so many padded tokens in a batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--name", default="throughput", help="of the results file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SHAPES["small" if options.small else "large"]
    if options.small:
        config = dataclasses.replace(config, layers=2)
        options.tokens, options.repeats = min(options.tokens, 4096), min(options.repeats, 3)
    options.lengths = options.lengths or ([77, 512] if options.small else [77, 512, 8192])
    tower, sdpa = pair(config)
    ours = {"ours": tower, "ours, compiled": tower}
    peers = {"transformers sdpa": sdpa}
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        peers["transformers flash_attention_2"] = pair(config, "flash_attention_2")[1]
    peak = next(
        (p for name, p in PEAKS.items() if device == "cuda" and torch.cuda.get_device_name().startswith(name)), None
    )
    for module in (tower, *peers.values()):
        module.to(device)

    generator = torch.Generator().manual_seed(0)
    results = {}
    for longest in options.lengths:
        texts = max(2, options.tokens // longest)
        # Half of the length on average, so that padding is what a batch of captions or passages has.
        lengths = log_normal_lengths(texts, generator, mean=longest / 2, longest=longest)
        packed, ids, mask = batch(lengths, config.vocab_size, generator, device)
        rows: dict[str, dict[str, float]] = {}
        for name, module in {**ours, **peers}.items():
            if "compiled" in name and device == "cpu":
                continue
            if module is tower:
                tower.configure(compile="compiled" in name)
                run = functools.partial(run_ours, tower, packed)
            else:
                run = functools.partial(run_theirs, module, ids, mask)
            took = seconds(run, module, options.repeats, device)
            rows[name] = {"tokens_per_second": round(sum(lengths) / took)}
            if peak:
                rows[name]["mfu"] = round(flops(config, lengths) / took / peak, 4)
        results[longest] = {"texts": texts, "real_tokens": sum(lengths), "padded_tokens": ids.numel(), "models": rows}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = {"width": config.width, "layers": config.layers, "heads": config.heads, "dtype": str(dtype)}
    write(
        options.name,
        {"shape": shape, "attention": choose_backend("auto", device, dtype, config.head_dim), "lengths": results},
    )


if __name__ == "__main__":
    main()
