"""Held-out recall after equal training time, ours beside open_clip's and sentence-transformers', on a CPU.

    python packages/stage-trainer/benchmarks/recall.py --corpus runs/corpus     # a quarter of an hour

Each contender trains in a process of its own, one after the other, on one thread, for so many seconds, of which making
the batches is a part and building and evaluating the model is not. All start from the same weights of the same towers,
draw from the same data (the recipe's first stage, the training split) through the same sampler, augmentation and
tokenizer, in batches of the same size, drop the same share of patches, and follow the same schedule by the clock: the
recipe's share of warm-up, then a cosine to nothing. Afterwards the weights are put into our towers, and the validation
split is searched by one and the same code.

On images and captions: open_clip's training loop with its loss, beside our trainer on the same images and captions and
nothing else ("ours, the same data"), and as its recipe has it, with text pairs in a task of their own ("ours").
On text pairs: sentence-transformers' Matryoshka loss over its ranking loss in both directions, beside our trainer.

The others' rates are the best on validation of those tried in runs of a minute: for open_clip 5e-4, 1e-3 and 4e-3
(which diverged) with AdamW, and 1e-2 with timm's Muon, which orthogonalises the table of word embeddings, too, and made
a third of the steps; for sentence-transformers 2e-3 and 5e-3 with AdamW.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import peers
import torch
from common import Ours
from stage_trainer.batch import Batch
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation import retrieval, text_retrieval
from stage_trainer.optim.schedule import schedule, set_rates
from stage_trainer.recipe import Recipe, Stage

IMAGES_ALONE = ("batch.text=0", "task_start.image_text=0")
TEXT_ALONE = ("batch.image_text=0", "task_start.text=0", "trainable.image=none")


def main() -> None:
    parser = common.parser(__doc__, "recall")
    parser.add_argument("--seconds", type=float, default=150.0, help="of training, for each contender")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--open-clip-optimizer", default="adamw", help="adamw, or timm/NAME")
    parser.add_argument("--open-clip-lr", type=float, default=1e-3)
    parser.add_argument("--sentence-transformers-lr", type=float, default=2e-3)
    parser.add_argument("--one", choices=list(CONTENDERS), help="train and measure this one alone, in this process")
    options = parser.parse_args()
    if options.small:
        options.seconds = min(options.seconds, 2.0)
    if options.one:
        print(json.dumps(CONTENDERS[options.one](options)))
        return
    results = {}
    for name in options.contenders:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(name, json.dumps(results[name]), flush=True)
    torch.set_num_threads(1)
    named = ("seconds", "open_clip_optimizer", "open_clip_lr", "sentence_transformers_lr")
    common.write(options.results, {name: getattr(options, name) for name in named}, results)


class Clock:
    """The training time of a contender: how much is left of it, and the rate that belongs to it."""

    def __init__(self, seconds: float, stage: Stage):
        self.seconds, self.warmup = seconds, stage.warmup_steps / stage.steps
        self.began, self.steps = time.perf_counter(), 0

    @property
    def share(self) -> float:
        return (time.perf_counter() - self.began) / self.seconds

    def rate(self) -> float:
        """The share of the peak rate."""
        fine = 10_000
        return schedule(int(self.share * fine), fine, int(self.warmup * fine))

    def steps_left(self) -> Iterator[int]:
        """Step numbers from 0, until the time is over."""
        while self.share < 1:
            yield self.steps
            self.steps += 1


def open_clip(options: argparse.Namespace) -> dict[str, Any]:
    recipe, model, data = prepared(options, *IMAGES_ALONE)
    o, stage, lr, name = recipe.optimizer, recipe.stage(1), options.open_clip_lr, options.open_clip_optimizer
    if name == "adamw":
        optimizer = peers.adamw(lr, o.weight_decay, o.betas, o.eps)
    else:
        optimizer = peers.timm_optimizer(name.removeprefix("timm/"), lr, o.weight_decay)
    dropout = stage.patch_dropout_at(0)
    theirs = peers.OpenClip(model, optimizer, clip=o.gradient_clipping, patch_dropout=dropout)
    clock = Clock(options.seconds, stage)
    theirs.train(
        (peers.for_open_clip(data(step)) for step in clock.steps_left()),
        lambda step: assign(theirs.optimizer, lr * clock.rate()),
    )
    theirs.put_into(model)
    return {"steps": clock.steps, "seconds": clock.share * clock.seconds, **of_images(options, model, recipe)}


def sentence_transformers(options: argparse.Namespace) -> dict[str, Any]:
    recipe, model, data = prepared(options, *TEXT_ALONE)
    o, stage, lr = recipe.optimizer, recipe.stage(1), options.sentence_transformers_lr
    optimizer = peers.adamw(lr, o.weight_decay, o.betas, o.eps)
    theirs = peers.SentenceTransformers(model, optimizer, dims=stage.loss.dims, scale=20.0, clip=o.gradient_clipping)
    clock = Clock(options.seconds, stage)
    for step in clock.steps_left():
        assign(theirs.optimizer, lr * clock.rate())
        theirs.step(peers.for_sentence_transformers(data(step)))
    theirs.put_into(model)
    return {"steps": clock.steps, "seconds": clock.share * clock.seconds, **of_texts(options, model)}


def ours(
    options: argparse.Namespace, measure: Callable[[argparse.Namespace, DualEncoder, Recipe], Any], *changes: str
) -> dict[str, Any]:
    common.start()
    recipe = recipe_of(options, *changes)
    trainer, data, stage = Ours(recipe), common.data_of(recipe), recipe.stage(1)
    clock = Clock(options.seconds, stage)
    for step in clock.steps_left():
        batch, _ = data[step]
        tasks = tuple(stage.batch_at(step))
        set_rates(trainer.engine.optimizer, clock.rate(), ("text", "image") if "image_text" in tasks else ("text",))
        trainer.step(batch, patch_dropout=stage.patch_dropout_at(step), tasks=tasks)
    return {"steps": clock.steps, "seconds": clock.share * clock.seconds, **measure(options, trainer.model, recipe)}


def recipe_of(options: argparse.Namespace, *changes: str) -> Recipe:
    """The recipe, at the resolution that its first stage starts with."""
    resolution = common.recipe_of(options).stage(1).resolution_at(0)
    return common.recipe_of(options, f"resolution=[[0, {resolution}]]", *changes)


def prepared(options: argparse.Namespace, *changes: str) -> tuple[Recipe, DualEncoder, Callable[[int], Batch]]:
    """(recipe, the model that ours starts with, what gives batch n) for another trainer."""
    common.start()
    recipe = recipe_of(options, *changes)
    data = common.data_of(recipe)
    return recipe, common.model_of(recipe), lambda step: data[step][0]


def assign(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def of_images(options: argparse.Namespace, model: DualEncoder, recipe: Recipe) -> dict[str, Any]:
    """Recall@5 by pool and direction, the mean over languages, at the full width and at the smallest dim."""
    found: dict[str, Any] = {}
    model.eval()
    for directory in held_out(options, "image-short"):
        pool = retrieval.Pool.open(directory)
        dims = recipe.model.text["width"], min(recipe.stage(1).loss.dims)
        recalls, chances = retrieval.score(pool, retrieval.embed(model, pool), dims)
        for direction in ("text→image", "image→text"):
            of = {dim: languages["mean"] for dim, languages in recalls[direction].items()}
            found[f"{pool.name}, {direction}"] = {**of, "chance": chances[direction]["chance"]["mean"]}
    return {"recall_at_5": found}


def of_texts(options: argparse.Namespace, model: DualEncoder, _: Recipe | None = None) -> dict[str, Any]:
    """Of finding a text in English by one in another language, by pool, the mean over languages: recall@5 of the
    captions' pools, nDCG@10 of the text pairs'."""
    recalls, gains = {}, {}
    model.eval()
    width = model.text.config.output_width
    for directory in held_out(options, "image-short"):
        pool = retrieval.Pool.open(directory)
        found, _chances = retrieval.score(pool, retrieval.embed(model, pool), [width])
        if of_text := found["text→English text"].get(str(width)):
            recalls[pool.name] = of_text["mean"]
    for directory in held_out(options, "text-pairs"):
        pairs = text_retrieval.PairPool.open(directory)
        gains[pairs.name] = text_retrieval.measure(pairs, model.encode_text)["ndcg_at_10/mean"]
    return {"recall_at_5": recalls, "ndcg_at_10": gains}


def held_out(options: argparse.Namespace, kind: str) -> list[Path]:
    return sorted((Path(options.corpus) / "validation" / kind).iterdir())


CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "images and captions: open_clip": open_clip,
    "images and captions: ours, the same data": lambda options: ours(options, of_images, *IMAGES_ALONE),
    "images and captions: ours": lambda options: ours(options, of_images),
    "text pairs: sentence-transformers": sentence_transformers,
    "text pairs: ours": lambda options: ours(options, of_texts, *TEXT_ALONE),
}

if __name__ == "__main__":
    main()
