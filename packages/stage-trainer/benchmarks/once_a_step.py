"""A step of gradient caching in bfloat16 on a CPU: weights cast once a step against in each pass.

    OMP_NUM_THREADS=1 python packages/stage-trainer/benchmarks/once_a_step.py             # half a minute
    OMP_NUM_THREADS=1 python packages/stage-trainer/benchmarks/once_a_step.py --compiled  # compiled too: three minutes

Ratios are what carries over to other machines. The ways run in turn, and each counts with its fastest run, in processor
time; all must have the same loss. How much of a step casts are depends on the tokens of a chunk, which are few here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from pathlib import Path
from unittest import mock

import torch
from common import write
from plan_memory import Engine, a_batch
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.recipe import GradientCache
from stage_trainer.tasks.contrastive import forward_backward
from text_tower import TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig

TEXT = TextTowerConfig(
    vocab_size=1000, width=384, layers=4, heads=6, mlp_width=1536, lora_rank=4, lora_alpha=4.0, adapters=("a",)
)
VISION = VisionTowerConfig(resolution=112, patch=14, width=384, layers=4, heads=6)
IMAGES, PAIRS, LENGTH, CHUNKS = 32, 32, 20, GradientCache(images=8, tokens=480)


def engine_of(compiled: bool) -> Engine:
    torch.manual_seed(0)
    text, vision = dataclasses.replace(TEXT, compile=compiled), dataclasses.replace(VISION, compile=compiled)
    return Engine(DualEncoder(TextTower(text), VisionTower(vision)), (384, 128), "bf16", torch.device("cpu"))


def seconds(engine: Engine, once: bool) -> tuple[float, float]:
    """(of a step, the sum of its losses)."""
    assert isinstance(VISION.resolution, int)
    batch = a_batch(IMAGES, PAIRS, LENGTH, VISION.resolution)
    way = contextlib.nullcontext() if once else mock.patch.object(engine, "cast_once", contextlib.nullcontext)
    began = time.process_time()
    with way:
        losses = forward_backward(engine, batch, pairs=("image_text", "text"), cache=CHUNKS)  # type: ignore[arg-type]
    took = time.process_time() - began
    engine.objective.zero_grad()
    return took, sum(float(loss) for loss, _ in losses.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="compiled blocks, too")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results") / "once_a_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {
        f"{'compiled' if compiled else 'eager'}, cast {'once' if once else 'in each pass'}": (engine, once)
        for compiled, engine in ((compiled, engine_of(compiled)) for compiled in (False, True)[: 1 + options.compiled])
        for once in (False, True)
    }
    best, losses = dict.fromkeys(ways, float("inf")), dict[str, float]()
    for turn in range(options.repeats + 1):
        for name, (engine, once) in ways.items():
            torch.manual_seed(0)
            took, losses[name] = seconds(engine, once)
            best[name] = min(best[name], took) if turn else best[name]
    first, *others = losses.values()
    assert all(abs(other / first - 1) < 2e-3 for other in others), losses
    least = best["eager, cast in each pass"]
    settings = {"images": IMAGES, "pairs": PAIRS, "tokens of a text": LENGTH, "chunks": dataclasses.asdict(CHUNKS)}
    settings |= {"width": TEXT.width, "layers": TEXT.layers}
    write(options.results, settings, {"seconds": least, "share": {name: took / least for name, took in best.items()}})


if __name__ == "__main__":
    main()
