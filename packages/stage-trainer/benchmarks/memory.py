"""Peak memory of a step with gradient caching as the global batch grows, on the laptop towers, on a CPU.

    python packages/stage-trainer/benchmarks/memory.py --corpus runs/corpus     # five minutes

Each batch size has a process of its own, in which smaller steps come first, so that the optimizer's state is there:
both tasks with the recipe's Matryoshka dims and patch dropout, AdamW, in chunks of one size. Two figures: the most
resident memory of the process, and, counted by torch's profiler over one more step, the most that was allocated at
once above what was there before it (weights, optimizer, batch).

Beside them stands what grows with the batch by nature: the batch itself (uint8 images, int64 token ids, ids and seeds)
and the embeddings with their gradients, in float32. Texts have four tokens, so that it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from plan_memory import peak_above
from stage_trainer.batch import Batch
from stage_trainer.recipe import GradientCache, Recipe
from text_tower import PackedTokens

TOKENS = 4


def main() -> None:
    parser = common.parser(__doc__, "memory")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="pairs of each task")
    parser.add_argument("--chunk", type=int, default=128, help="images, and texts, of one forward pass")
    parser.add_argument("--one", type=int, help="measure this batch alone, in this process")
    options = parser.parse_args()
    if options.small:
        options.batches, options.chunk = [16, 64], 8
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    rows = []
    for size in options.batches:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(size)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"pairs": size, **json.loads(output.splitlines()[-1])})
    torch.set_num_threads(1)
    shape = common.shape(recipe_of(options, options.batches[0]))
    settings = {"chunk": options.chunk, "tokens_of_a_text": TOKENS, **shape}
    common.write(options.results, settings, {"batches": rows, "growth": growth(rows[0], rows[-1])})


def growth(least: dict[str, Any], most: dict[str, Any]) -> dict[str, float]:
    """Bytes for each further pair of the batch, from the smallest to the largest."""
    pairs = most["pairs"] - least["pairs"]
    return {name: (most[name] - least[name]) / pairs for name in least if name != "pairs"}


def recipe_of(options: argparse.Namespace, pairs: int) -> Recipe:
    return common.recipe_of(
        options, "optimizer.name=adamw", f"batch.image_text={pairs}", f"batch.text={pairs}",
        "task_start.image_text=0", "task_start.text=0",
    )  # fmt: skip


def measure(options: argparse.Namespace, pairs: int) -> dict[str, int]:
    """Bytes of a step on `pairs` images with captions and as many text pairs."""
    common.start()
    recipe = recipe_of(options, pairs)
    stage, width, vocabulary = recipe.stage(1), recipe.model.text["width"], recipe.model.text["vocab_size"]
    assert isinstance(width, int)
    assert isinstance(vocabulary, int)
    ours = common.Ours(recipe, GradientCache(images=options.chunk, tokens=options.chunk * TOKENS))

    def step(batch: Batch) -> None:
        ours.step(batch, patch_dropout=stage.patch_dropout_at(0))

    for _ in range(2):
        step(batch_of(2 * options.chunk, stage.resolution_at(0), vocabulary))
    batch = batch_of(pairs, stage.resolution_at(0), vocabulary)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    step(batch)
    resident = peak_resident()
    allocated = peak_above(lambda: step(batch))
    assert batch.images is not None
    assert isinstance(batch.texts, PackedTokens)
    tensors = [batch.images, batch.texts.ids, batch.texts.cu_seqlens, batch.image_seeds, batch.text_seeds]
    return {
        "resident_bytes": resident,
        "allocated_bytes": allocated,
        "batch_bytes": sum(t.nbytes for t in [*tensors, batch.image_ids, batch.text_ids]),
        # An image, its caption, a query and its target; their gradients.
        "embedding_bytes": 2 * 4 * pairs * width * 4,
    }


def batch_of(pairs: int, resolution: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary - 1, (3 * pairs * TOKENS,), generator=generator)
    return Batch(
        images=torch.randint(0, 256, (pairs, 3, resolution, resolution), dtype=torch.uint8, generator=generator),
        image_seeds=torch.arange(pairs),
        texts=PackedTokens(ids, torch.arange(0, len(ids) + 1, TOKENS, dtype=torch.int32), TOKENS),
        text_seeds=torch.arange(3 * pairs),
        image_ids=torch.arange(pairs),
        pairs=pairs,
        negatives=0,
        text_ids=torch.arange(pairs),
    )


def peak_resident() -> int:
    """By Linux's account, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    main()
