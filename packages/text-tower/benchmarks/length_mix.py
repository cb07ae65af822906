"""Forward and backward on texts of mixed lengths: packed against transformers' padded SDPA, on a CPU.

    python packages/text-tower/benchmarks/length_mix.py  # under a minute

The ideal ratio is padded tokens ÷ real tokens: what never computing a padding token could save if nothing else changed.
Both run the same fixed batches in turn; each batch counts with its fastest run.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial

import torch
from common import SHAPES, batch, log_normal_lengths, pair, run_ours, run_theirs, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--texts", type=int, default=32, help="in a batch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()

    config = dataclasses.replace(SHAPES["small"], layers=options.layers)
    tower, model = pair(config)
    generator = torch.Generator().manual_seed(0)
    batches = [
        batch(log_normal_lengths(options.texts, generator), config.vocab_size, generator)
        for _ in range(options.batches)
    ]
    seconds = {"ours": 0.0, "transformers": 0.0}
    for packed, ids, mask in batches:
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "ours": partial(run_ours, tower, packed),
            "transformers": partial(run_theirs, model, ids, mask),
        }
        torch.testing.assert_close(runs["ours"](), runs["transformers"](), rtol=1e-4, atol=1e-4)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run().square().sum().backward()
                times[name].append(time.perf_counter() - start)
                tower.zero_grad()
                model.zero_grad()
        for name in runs:
            seconds[name] += min(times[name])
    real = sum(len(packed.ids) for packed, _, _ in batches)
    padded = sum(ids.numel() for _, ids, _ in batches)
    ratio, ideal = seconds["transformers"] / seconds["ours"], padded / real
    write(
        "length_mix",
        {
            "shape": {"width": config.width, "layers": config.layers, "heads": config.heads, "dtype": "float32"},
            "texts_in_a_batch": options.texts,
            "real_tokens": real,
            "padded_tokens": padded,
            "seconds": seconds,
            "times_faster": ratio,
            "ideal": ideal,
            "share_of_ideal": ratio / ideal,
        },
    )


if __name__ == "__main__":
    main()
