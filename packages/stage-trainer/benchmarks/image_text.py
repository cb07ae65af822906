"""A training step on images and captions, ours beside open_clip's, in pairs a second, on one thread of a CPU.

    python packages/stage-trainer/benchmarks/image_text.py --corpus runs/corpus     # four minutes

The same towers with the same weights (see peers.py), the same images and captions, batch and optimizer (fused AdamW,
the gradient clipped), float32, InfoNCE at the full width alone, because open_clip has no Matryoshka loss. open_clip
runs its own training loop, as it is and under torch.compile, gets its images normalised and pads captions to the
longest of the batch.

Two settings: all captions of one length, where no padding is in play; and captions as the corpus has them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import common
import torch
from common import Ours, of_one_length, tokens, with_padding
from peers import OpenClip, adamw, for_open_clip
from stage_trainer.batch import Batch


def main() -> None:
    parser = common.parser(__doc__, "image_text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    if options.small:
        options.repeats, options.batches = 1, 1
    common.start()
    width = common.recipe_of(options).model.text["width"]
    recipe = common.recipe_of(
        options, "optimizer.name=adamw", "optimizer.embedding_lr_scale=1", "batch.text=0",
        "task_start.image_text=0", f"loss.dims=[{width}]", "lr.image=1e-4", "lr.text=1e-4",
    )  # fmt: skip

    batches = common.first_batches(recipe, options.batches)
    pairs = len(batches[0].image_ids)
    length = round(tokens(batches) / len(batches) / pairs)
    vocabulary = recipe.model.text["vocab_size"]
    assert isinstance(vocabulary, int)
    level = [of_one_length(batch, length, vocabulary) for batch in batches]
    longest = [with_padding(batch, pairs) for batch in batches]

    ours, o, rate = Ours(recipe), recipe.optimizer, recipe.stage(1).lr.image
    assert rate is not None
    optimizer = adamw(rate, o.weight_decay, o.betas, o.eps)
    peers = {"open_clip": OpenClip(ours.model, optimizer, clip=o.gradient_clipping)}
    if not options.small:
        peers["open_clip, compiled"] = OpenClip(ours.model, optimizer, clip=o.gradient_clipping, compiled=True)
    check(ours, peers["open_clip"], batches[0])

    def runs(of: list[Batch]) -> dict[str, list[Any]]:
        theirs = {name: [partial(peer.train, [for_open_clip(batch)]) for batch in of] for name, peer in peers.items()}
        return {**theirs, "ours": [partial(ours.step, batch) for batch in of]}

    one_length, mixed = runs(level), runs(batches)
    seconds = common.rounds(one_length, options.repeats)
    steps = {name: steps[0] for name, steps in one_length.items()}
    per_step = {name: s / len(batches) for name, s in seconds.items()}
    results: dict[str, Any] = {
        "one_length": {
            "tokens_of_a_text": length,
            **compared(seconds, pairs * len(batches)),
            "seconds_of_a_step": common.anatomy(steps, per_step, options.repeats),
        }
    }
    common.with_text_towers(mixed, ours, batches, longest)
    seconds = common.rounds(mixed, options.repeats)
    results["as_they_come"] = {
        **compared({name: seconds[name] for name in one_length}, pairs * len(batches)),
        "padding": common.padding(seconds, tokens(batches), tokens(longest)),
    }
    common.write(options.results, {"pairs": pairs, "batches": len(batches), **common.shape(recipe)}, results)


def check(ours: Ours, theirs: OpenClip, batch: Batch) -> None:
    """Both compute the same loss; ours is the sum of both directions, open_clip's their mean."""
    with torch.no_grad():
        found = theirs.loss(**theirs.model.train()(*for_open_clip(batch)))
        embedded = ours.engine.forward(batch)
        losses = ours.engine.objective.losses(embedded, batch, pairs=("image_text",))
    torch.testing.assert_close(losses["image_text"][0], 2 * found, rtol=1e-5, atol=0)


def compared(seconds: dict[str, float], pairs: int) -> dict[str, Any]:
    """Pairs a second, and how many times open_clip's best speed ours is."""
    best = min(s for name, s in seconds.items() if name != "ours")
    return {
        "pairs_per_second": {name: pairs / s for name, s in seconds.items()},
        "times_open_clip": best / seconds["ours"],
    }


if __name__ == "__main__":
    main()
