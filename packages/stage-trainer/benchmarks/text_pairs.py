"""A training step on text pairs, ours beside sentence-transformers', in pairs a second, on one thread of a CPU.

    python packages/stage-trainer/benchmarks/text_pairs.py --corpus runs/corpus     # four minutes

The same tower with the same weights (see peers.py), the same pairs, batch and optimizer (fused AdamW, the gradient
clipped), float32, Matryoshka InfoNCE in both directions, without and with gradient caching at the same size of chunks.
sentence-transformers pads each column to its longest, in each chunk where it caches; its chunks of so many texts and
those of so many tokens are both tried. Its step is a plain loop around its loss, without what its Trainer adds.

Two settings: all texts of one length, where no padding is in play; and texts as the corpus has them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import common
import torch
from common import Ours, of_one_length, tokens, with_padding
from peers import SentenceTransformers, adamw, for_sentence_transformers
from stage_trainer.batch import Batch
from stage_trainer.recipe import GradientCache, Recipe
from stage_trainer.recipe.schema import NEW_TEMPERATURE


def main() -> None:
    parser = common.parser(__doc__, "text_pairs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=7, help="one source each; after seven all had their share")
    parser.add_argument("--pairs", type=int, default=128, help="in a batch")
    parser.add_argument("--chunk", type=int, default=64, help="texts of one forward pass with gradient caching")
    options = parser.parse_args()
    if options.small:
        options.repeats, options.batches, options.pairs, options.chunk = 1, 1, 16, 4
    common.start()
    recipe = common.recipe_of(
        options, "optimizer.name=adamw", "optimizer.embedding_lr_scale=1", "batch.image_text=0",
        f"batch.text={options.pairs}", "task_start.text=0", "trainable.image=none", "lr.text=1e-4",
    )  # fmt: skip

    batches = common.first_batches(recipe, options.batches)
    length = round(tokens(batches) / len(batches) / (2 * options.pairs))
    vocabulary = recipe.model.text["vocab_size"]
    assert isinstance(vocabulary, int)
    level = [of_one_length(batch, length, vocabulary) for batch in batches[:3]]
    chunk = options.chunk * length
    results = {
        "plain": measured(recipe, batches, level, options.repeats, None, {"sentence-transformers": None}),
        "cached": measured(
            recipe,
            batches,
            level,
            options.repeats,
            GradientCache(images=options.chunk, tokens=chunk),
            {
                "sentence-transformers, chunks of texts": {"mini_batch_size": options.chunk},
                # The size in texts still cuts its similarity matrix.
                "sentence-transformers, chunks of tokens": {
                    "mini_batch_size": options.chunk,
                    "mini_batch_num_tokens": chunk,
                },
            },
        ),
    }
    settings = {
        "pairs": options.pairs, "batches": len(batches), "tokens_of_a_text": length,
        "chunk": {"texts": options.chunk, "tokens": chunk}, "dims": recipe.stage(1).loss.dims,
        "text": recipe.model.text,
    }  # fmt: skip
    common.write(options.results, settings, results)


def measured(
    recipe: Recipe,
    batches: list[Batch],
    level: list[Batch],
    repeats: int,
    cache: GradientCache | None,
    how: dict[str, dict[str, int] | None],
) -> dict[str, Any]:
    ours, o, stage = Ours(recipe, cache), recipe.optimizer, recipe.stage(1)
    assert stage.lr.text is not None
    peers = {
        name: SentenceTransformers(
            ours.model,
            adamw(stage.lr.text, o.weight_decay, o.betas, o.eps),
            dims=stage.loss.dims,
            scale=1 / (recipe.model.temperature or NEW_TEMPERATURE),
            clip=o.gradient_clipping,
            cached=cached,
        )
        for name, cached in how.items()
    }

    def runs(of: list[Batch]) -> dict[str, list[Any]]:
        theirs = {
            name: [partial(peer.step, for_sentence_transformers(batch)) for batch in of] for name, peer in peers.items()
        }
        return {**theirs, "ours": [partial(ours.step, batch) for batch in of]}

    one_length, mixed = runs(level), runs(batches)
    # All compute the same loss; ours is the sum of both directions, theirs the mean.
    loss = ours.step(batches[0])
    for name in peers:
        torch.testing.assert_close(2 * mixed[name][0](), loss, rtol=1e-5, atol=0)
    seconds = common.rounds(one_length, repeats)
    steps = {name: steps[0] for name, steps in one_length.items()}
    per_step = {name: s / len(level) for name, s in seconds.items()}
    found: dict[str, Any] = {
        "one_length": {
            **compared(seconds, sum(batch.pairs for batch in level)),
            "seconds_of_a_step": common.anatomy(steps, per_step, repeats),
        }
    }
    longest = [with_padding(batch, batch.pairs, batch.pairs) for batch in batches]
    if cache is None:
        common.with_text_towers(mixed, ours, batches, longest)
    seconds = common.rounds(mixed, repeats)
    found["as_they_come"] = compared({name: seconds[name] for name in one_length}, sum(b.pairs for b in batches))
    if cache is None:
        found["as_they_come"]["padding"] = common.padding(seconds, tokens(batches), tokens(longest))
    return found


def compared(seconds: dict[str, float], pairs: int) -> dict[str, Any]:
    """Pairs a second, and how many times sentence-transformers' best speed ours is."""
    best = min(s for name, s in seconds.items() if name != "ours")
    return {
        "pairs_per_second": {name: pairs / s for name, s in seconds.items()},
        "times_sentence_transformers": best / seconds["ours"],
    }


if __name__ == "__main__":
    main()
