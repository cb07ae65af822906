"""Lengths of a stage's texts and the share that `max_tokens` cuts: given, counted, from sidecars, or assumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.shards import Dataset, ShardError
from text_tower import Tokenizer

from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote_data import place
from stage_trainer.data.samples import texts_of
from stage_trainer.recipe import ModelConfig, Recipe, Source, Stage
from stage_trainer.weights import tower_weights

SAMPLES, SHARDS = 256, 8
"""Samples of a data set whose texts are counted, out of so many of its shards, both evenly spread."""
FEW = 32
"""Fewer samples than these say nothing of how long a batch may be."""


@dataclass(frozen=True)
class Counted:
    """Of a data set: mean tokens of a text after cutting and of their squares, the number of samples looked at, the
    share of texts that are cut, and how that was found."""

    source: Source
    mean: float
    square: float
    samples: int
    cut: float
    origin: str

    def most(self, texts: int) -> float:
        """What the mean over so many of its texts stays below: six standard deviations above its own, that of the
        counted sample included, and a quarter more, because shards may differ."""
        if self.samples < FEW:
            return math.inf
        deviation = math.sqrt(max(0.0, self.square - self.mean**2))
        return 1.25 * (self.mean + 6 * deviation * math.sqrt(1 / texts + 1 / self.samples))


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a text for each task, how they were found, and lines of output about texts that are cut.

    Attributes:
        squares: mean of the squares of all lengths over the square of their mean.
        counted: for each task what is known of its data sets, None for one of which nothing is.
    """

    captions: float
    texts: float
    origin: str
    cut: tuple[str, ...] = ()
    squares: float = 1.0
    counted: dict[str, list[Counted | None]] = field(default_factory=dict)

    def most(self, max_tokens: int, images: int, pairs: int) -> Lengths:
        """Means that batches of so many captions and text pairs stay below (`Counted.most`): a batch of text pairs
        comes from one source, and one of captions may for a while. What was not counted may be as long as it can."""
        means = []
        for task, texts in (("image_text", images), ("text", pairs)):
            known = self.counted.get(task) or [None]
            means.append(max(min(each.most(max(1, texts)), max_tokens) if each else max_tokens for each in known))
        return replace(self, captions=means[0], texts=means[1])


def text_lengths(recipe: Recipe, stage: Stage, mean_tokens: float | None) -> Lengths:
    """Mean tokens: `mean_tokens` if given, else counted on the data where they are, else half of `max_tokens`."""
    tokenizer = _tokenizer(recipe.model)
    found: dict[str, list[Counted | None]] = {}
    for task, what in (("image_text", "captions"), ("text", "texts")):
        sources = getattr(stage.data, task) if stage.reads(what) else ()
        found[task] = [_counted(DataConfig.of(recipe), source, stage.max_tokens, tokenizer) for source in sources]
    counted = [each for task in found.values() for each in task if each]
    unknown = sum(each is None for task in found.values() for each in task)
    cut = [
        f"{_name(each.source)}: {each.cut:.1%} of the texts are longer than max_tokens {stage.max_tokens} and are cut "
        f"({each.origin})"
        for each in counted
        if each.cut
    ]
    if counted and not cut:
        cut = [f"no text is longer than max_tokens {stage.max_tokens} ({', '.join({c.origin: 0 for c in counted})})"]
    if unknown:
        cut.append(f"data sets of which it is not known how many texts max_tokens {stage.max_tokens} cuts: {unknown}")
    if mean_tokens is not None:
        mean = min(mean_tokens, stage.max_tokens)
        return Lengths(mean, mean, f"texts of {mean:g} tokens on average, as told", tuple(cut), counted=found)
    assumed = stage.max_tokens / 2
    captions, texts = (_mean(of_task, assumed) for of_task in found.values())
    if counted:
        guessed = " (assumed: half of max_tokens)"
        of_task = [(captions, "captions", found["image_text"]), (texts, "texts", found["text"])]
        said = [f"{mean:.0f} tokens of {what}{'' if any(of) else guessed}" for mean, what, of in of_task if of]
        origin = f"{' and '.join(said)} on average"
    else:
        origin = f"texts of {assumed:g} tokens on average, half of max_tokens (assumed; --mean-tokens says otherwise)"
    return Lengths(captions, texts, origin, tuple(cut), _squares(counted), found)


def _squares(counted: list[Counted]) -> float:
    weight = sum(each.source.rate for each in counted)
    if not weight:
        return 1.0
    mean, square = (sum(each.source.rate * getattr(each, of) for each in counted) / weight for of in ("mean", "square"))
    return float(square / mean**2)


def _mean(counted: list[Counted | None], assumed: float) -> float:
    known = [each for each in counted if each]
    weight = sum(each.source.rate for each in known)
    return sum(each.source.rate * each.mean for each in known) / weight if weight else assumed


def _name(source: Source) -> str:
    return "/".join(source.path.partition("?")[0].rstrip("/").split("/")[-2:])


def _tokenizer(model: ModelConfig) -> Tokenizer | None:
    try:
        path = model.tokenizer or tower_weights(model, "text", fetch=False)
        return Tokenizer.from_file(path) if path else None
    except (ValueError, OSError):  # a plan needs none; a run says what is wrong with it
        return None


def _counted(config: DataConfig, source: Source, max_tokens: int, tokenizer: Tokenizer | None) -> Counted | None:
    """Counted with the recipe's tokenizer on a sample of the texts; without the tokenizer, from the sidecars' length of
    each sample's longest text. None for data that are missing or were not counted."""
    where = place(config, "train", source.path)
    if not isinstance(where, Path):
        return None
    try:
        data = Dataset.open(where, check=False)
        chosen = _spread(data)
        if tokenizer is None:
            lengths = [tokens for index in chosen if (tokens := data.row(index).tokens)]
            parts = [[[length]] for length in lengths]
            origin = f"the longest text of each of {len(lengths)} samples, by the sidecars"
        else:
            parts = [_parts(texts_of(data, index, data.read(index)), tokenizer) for index in chosen]
            origin = f"the texts of {len(chosen)} samples counted"
    except (ShardError, OSError, KeyError, TypeError):  # a run names what is damaged
        return None
    if not parts:
        return None
    mean = _expected(parts, lambda tokens: min(tokens, max_tokens))
    square = _expected(parts, lambda tokens: min(tokens, max_tokens) ** 2)
    cut = _expected(parts, lambda tokens: tokens > max_tokens)
    return Counted(source, mean, square, len(parts), cut, origin)


def _spread(data: Dataset) -> list[int]:
    """Numbers of samples, evenly over the data set, of few shards."""
    shards = _evenly(len(data.shard_sizes), SHARDS)
    return [
        samples.start + number
        for samples in map(data.samples_of, shards)
        for number in _evenly(len(samples), SAMPLES // max(1, len(shards)))
    ]


def _evenly(size: int, most: int) -> list[int]:
    return sorted({number * size // most for number in range(most)}) if size else []


def _parts(content: dict[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of a sample's texts: a list for each text that a step takes, with those of which it takes one."""
    alternatives = [content[name] for name in ("captions", "query", "target") if content.get(name)]
    alternatives += content.get("negatives", [])
    return [[len(ids) for ids in tokenizer([text["text"] for text in part])] for part in alternatives]


def _expected(samples: Iterable[list[list[int]]], what: Callable[[int], float]) -> float:
    """The mean of something of a text's tokens over the texts that steps take."""
    parts = [part for sample in samples for part in sample]
    return sum(sum(map(what, part)) / len(part) for part in parts) / len(parts)
