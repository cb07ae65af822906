"""What equal_time.py trains: open_clip's own loop, sentence-transformers' own Trainer, and ours, each until its
processor time is spent."""

from __future__ import annotations

import io
import itertools
import math
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import common
import datasets
import peers
import torch
from common import Ours
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import image_transform
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from stage_trainer.build import load_tokenizer
from stage_trainer.data.batches import StageBatches
from stage_trainer.data.samples import image_of, texts_of
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.optim.schedule import schedule, set_rates
from stage_trainer.recipe import Recipe
from stage_trainer.tasks import make_task
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

Settings = Mapping[str, Any]
WORD_TABLE = "*word_embeddings*"
PAIRS_PER_SECOND = 2500
"""More text pairs than these are not drawn beforehand: twice what a thread of a fast processor trains on."""
TEXT_FIRST = 100_000
"""As many steps of text alone as no run makes: which share of the time is so is decided by the clock."""
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "strong": {"scale": (0.5, 1.0), "color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.8},
}
"""open_clip's `--aug-cfg`."""


@dataclass(frozen=True)
class Job:
    """One training: who, with which settings, for how many seconds of processor time, measured on which split."""

    contender: str
    settings: Settings
    seconds: float
    seed: int
    split: str
    corpus: str
    small: bool

    def recipe(self, *changes: str) -> Recipe:
        """Its recipe; all stages at the resolution that the first one starts with."""
        options: Any = SimpleNamespace(corpus=self.corpus, small=self.small)
        size = common.recipe_of(options).stage(1).resolution_at(0)
        fixed = (f"{stage}resolution=[[0, {size}]]" for stage in ("", "stages.2.", "stages.3."))
        return common.recipe_of(
            options, *fixed, f"seed={self.seed}", f"precision={self.settings['precision']}", *changes
        )

    def data(self, recipe: Recipe, stage: int = 1) -> StageBatches:
        made = make_task(recipe, stage).make_batches(load_tokenizer(recipe), 0, 1)
        assert isinstance(made, StageBatches)
        return made


class Clock:
    """Processor time of this process, all of its threads: how much is spent, and the rate that belongs to it."""

    def __init__(self, job: Job, recipe: Recipe):
        stage = recipe.stage(1)
        self.seconds, self.warmup, self.steps = job.seconds, stage.warmup_steps / stage.steps, 0
        self.start()

    def start(self) -> None:
        self.began = time.process_time()

    @property
    def spent(self) -> float:
        return time.process_time() - self.began

    @property
    def share(self) -> float:
        return self.spent / self.seconds

    def rate(self) -> float:
        """The share of the peak rate: the recipe's share of warm-up, then a cosine to nothing."""
        fine = 10_000
        return schedule(int(self.share * fine), fine, int(self.warmup * fine))

    def ticks(self) -> Iterator[int]:
        """Step numbers from 0, until the time is spent."""
        while self.share < 1:
            yield self.steps
            self.steps += 1

    def figures(self) -> dict[str, float]:
        return {"steps": self.steps, "processor_seconds": self.spent}


def open_clip(job: Job) -> tuple[DualEncoder, dict[str, float]]:
    recipe = job.recipe("batch.text=0", "task_start.image_text=0")
    model, stage, settings = common.model_of(recipe), recipe.stage(1), job.settings
    random.seed(job.seed)  # its colours
    theirs = peers.OpenClip(
        model,
        optimizer(settings, recipe),
        clip=recipe.optimizer.gradient_clipping,
        patch_dropout=settings["patch_dropout"],
    )
    theirs.settings.precision = {"bf16": "amp_bf16"}.get(settings["precision"], settings["precision"])
    transform = image_transform(stage.resolution_at(0), is_train=True, aug_cfg=AUGMENTATIONS[settings["augmentation"]])
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(recipe).save_for_others(folder)
        tokenizer = HFTokenizer(folder, context_length=stage.max_tokens)

    def together(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        """Its tokenizer fills up to the context length; what no text of the batch needs is left away again."""
        images, captions = zip(*samples, strict=True)
        ids = tokenizer(list(captions))
        return torch.stack(images), ids[:, : int((ids != peers.PAD).sum(dim=1).max())]

    captioned = Captioned(job.data(recipe), transform, job.seed)
    loader = DataLoader(captioned, batch_size=stage.batch.image_text, collate_fn=together)
    peak = rates(theirs.optimizer)
    clock = Clock(job, recipe)
    batches = (batch for _, batch in zip(clock.ticks(), loader, strict=False))
    theirs.train(batches, lambda step: assign(theirs.optimizer, peak, clock.rate()))
    figures = clock.figures()
    theirs.put_into(model)
    return model, figures


class Captioned(IterableDataset[tuple[Tensor, str]]):
    """The recipe's images in the order of its sampler, each with one of its captions; decoded once.

    Args:
        data: of which the image sources and their sampler count.
        transform: from a PIL image.
        seed: of the captions.
    """

    def __init__(self, data: StageBatches, transform: Callable[[Image.Image], Tensor], seed: int):
        self.data, self.transform, self.chance = data, transform, random.Random(seed)
        self.decoded: dict[tuple[int, int], tuple[Image.Image, list[str]]] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        sampler = self.data.image_sampler
        assert sampler is not None
        for number in itertools.count():
            for draw in sampler.part(number).within(0, sampler.batch):
                image, captions = self.sample(draw.source, draw.index)
                yield self.transform(image), self.chance.choice(captions)

    def sample(self, source: int, index: int) -> tuple[Image.Image, list[str]]:
        if (source, index) not in self.decoded:
            data: Any = self.data.image_sources[source]
            members = data.read(index)
            image, content = image_of(members), texts_of(data, index, members)
            assert image is not None
            captions = [caption["text"] for caption in content["captions"]]
            self.decoded[source, index] = Image.open(io.BytesIO(image)).convert("RGB"), captions
        return self.decoded[source, index]


def sentence_transformers(job: Job) -> tuple[DualEncoder, dict[str, float]]:
    recipe = job.recipe("batch.image_text=0", "task_start.text=0", "trainable.image=none")
    model, stage, settings = common.model_of(recipe), recipe.stage(1), job.settings
    theirs = peers.SentenceTransformers(
        model,
        optimizer(settings, recipe),
        dims=stage.loss.dims,
        scale=settings["scale"],
        clip=recipe.optimizer.gradient_clipping,
    )
    theirs.model.max_seq_length = stage.max_tokens
    size = stage.batch.text
    count = math.ceil(job.seconds * PAIRS_PER_SECOND / size) + 8 * len(stage.data.text)
    pairs = drawn_pairs(job.data(recipe), count, job.seed)
    clock = Clock(job, recipe)
    ends = Ends(clock)
    follow = torch.optim.lr_scheduler.LambdaLR(theirs.optimizer, lambda step: clock.rate())
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=size, num_train_epochs=1, max_grad_norm=theirs.clip, seed=job.seed,
            use_cpu=True, bf16=settings["precision"] == "bf16", batch_sampler=settings["sampler"],
            multi_dataset_batch_sampler="proportional", dataloader_drop_last=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            theirs.model, arguments, train_dataset=pairs, loss=theirs.loss, optimizers=(theirs.optimizer, follow),
            callbacks=[ends],
        )  # fmt: skip
        trainer.train()
    if not ends.figures:
        raise SystemExit(f"the text pairs ran out after {clock.spent:.0f} of {job.seconds:g} s; raise PAIRS_PER_SECOND")
    theirs.put_into(model)
    return model, ends.figures


class Ends(TrainerCallback):
    """The Trainer's training begins with the clock and ends with it."""

    def __init__(self, clock: Clock):
        self.clock, self.figures = clock, dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.steps += 1
        if self.clock.share >= 1:
            control.should_training_stop = True
            self.figures = self.clock.figures()


def drawn_pairs(data: StageBatches, count: int, seed: int) -> datasets.DatasetDict:
    """The text pairs of `count` batches of our sampler, by source: as many of each as its rate says."""
    chance, sampler = random.Random(seed), data.text_sampler
    assert sampler is not None
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"query": [], "target": []})
    for number in range(count):
        for draw in sampler.part(number).within(0, sampler.batch):
            source = data.text_sources[draw.source]
            _, content = data.cache.sample(source, draw.index)
            query = chance.choice(content["query"])["text"]
            others = [t for t in content["target"] if t["text"] != query] or content["target"]
            wanted = [t for t in others if t["language"] == data.stage.data.text[draw.source].target_language]
            columns = found[f"{draw.source} {source.source}"]
            columns["query"].append(query)
            columns["target"].append(chance.choice(wanted or others)["text"])
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in found.items()})


def ours(job: Job) -> tuple[DualEncoder, dict[str, float]]:
    """Both tasks: a share of the time on text alone, then stage after stage, each for its share of the rest. The
    optimizer and its one cosine go on through the stages, which give data, batches and augmentation."""
    recipe = job.recipe(f"steps={2 * TEXT_FIRST}", f"task_start.image_text={TEXT_FIRST}", "warmup_steps=1")
    trainer = Ours(recipe)
    split, first = job.settings["stages"], job.settings["text_first"]
    ends = [first + (1 - first) * part / sum(split) for part in itertools.accumulate(split)]
    data = {number: job.data(recipe, number) for number, part in enumerate(split, 1) if part}
    counts: dict[tuple[int, bool], int] = defaultdict(int)
    clock = Clock(job, job.recipe())
    for _ in clock.ticks():
        share = clock.share
        number = next((n for n, end in enumerate(ends, 1) if share < end), len(ends))
        alone = share < first
        step = counts[number, alone] + (TEXT_FIRST if number == 1 and not alone else 0)
        counts[number, alone] += 1
        stage = recipe.stage(number)
        tasks = tuple(stage.batch_at(step))
        set_rates(trainer.engine.optimizer, clock.rate(), ("text",) if alone else ("text", "image"))
        trainer.step(data[number][step][0], patch_dropout=stage.patch_dropout_at(step), tasks=tasks)
    return trainer.model, clock.figures()


def optimizer(settings: Settings, recipe: Recipe) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    """torch's fused AdamW, or timm's Muon, which open_clip takes as `--opt timm/muon`, with the word table left to its
    AdamW as vectors are."""
    o, lr = recipe.optimizer, settings["lr"]
    if settings["optimizer"] == "adamw":
        return peers.adamw(lr, o.weight_decay, o.betas, o.eps)
    return lambda model: create_optimizer_v2(
        model, settings["optimizer"], lr=lr, weight_decay=o.weight_decay, fallback_list=(WORD_TABLE,)
    )


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def assign(optimizer: torch.optim.Optimizer, peak: Iterable[float], share: float) -> None:
    for group, rate in zip(optimizer.param_groups, peak, strict=True):
        group["lr"] = rate * share


TRAINERS = {"open_clip": open_clip, "sentence-transformers": sentence_transformers, "ours": ours}
