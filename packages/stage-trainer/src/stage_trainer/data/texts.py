"""Single texts, drawn by language: one language a batch. What a task takes of them is a subclass's matter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from data_prep.shards import Dataset, ShardError
from text_tower import Tokenizer

from stage_trainer.data.config import DataConfig
from stage_trainer.data.drawn import Corrupt, Drawn
from stage_trainer.data.lanes import SourceOrder
from stage_trainer.data.look_ahead import fetch_sidecars, newly_fetched
from stage_trainer.data.opening import open_data_set
from stage_trainer.data.pieces import BatchesInPieces
from stage_trainer.data.remote_data import place
from stage_trainer.data.sampler import TaskSampler
from stage_trainer.data.samples import REPLACEMENTS, SampleCache, another
from stage_trainer.data.stateless_rng import key, permutation
from stage_trainer.errors import UserError
from stage_trainer.recipe import Stage
from stage_trainer.recipe.address import is_remote

HELD_OUT = 64
"""Texts of each language that stand for its held-out ones."""
Made = TypeVar("Made")
"""What a task takes of a batch's texts."""


class Texts(ABC, Generic[Made]):
    """The texts of a stage's data sets (those of its kind in `data`), by language.

    A language's samples are numbered from 0, through all data sets, by their sidecars; a sample gives one of its texts
    in that language. Of a text longer than `stage.max_tokens` it is a window, drawn like all else from a seed.

    Args:
        split: "train", or "validation", which a data set may lack.

    Raises:
        UserError: a data set that is missing, damaged or not of texts.
    """

    def __init__(self, data: DataConfig, stage: Stage, split: str, tokenizer: Tokenizer):
        paths: Iterable[str] = getattr(stage.data, stage.kind.task)
        if split == "validation":
            below = [path for path in paths if not is_remote(path)]  # a URL has no splits
            paths = [path for path in below if place(data, split, path).is_dir()]
        self.tokenizer, self.max_tokens = tokenizer, stage.max_tokens
        self.cache = SampleCache(data.cache_megabytes, data.max_pixels)
        self.data_sets = [open_data_set(place(data, split, path), ("text-",)) for path in paths]
        self._first = np.cumsum([0, *map(len, self.data_sets)])
        try:
            fetch_sidecars(self.data_sets)
            by_shard = _by_language(self.data_sets)
        except ValueError as error:  # a sidecar's own words
            raise UserError(str(error)) from error
        self.samples = {language: np.concatenate(by_shard[language]) for language in sorted(by_shard)}
        self.shard_sizes = {language: [len(part) for part in parts] for language, parts in by_shard.items()}

    @abstractmethod
    def made(self, ids: list[list[int]], seeds: Sequence[int], drawn: Drawn) -> Made:
        """A batch of texts, of each its tokens and a seed; counts in `drawn` the tokens that a tower reads."""

    def batch(self, language: str, numbers: Sequence[int], seeds: Sequence[int], drawn: Drawn) -> Made:
        """One text of each of the language's samples `numbers`; which, and what is made of it, follows from its seed.

        A sample that is of no use is replaced by another of the language, always the same one, and entered in `drawn`.
        """
        texts = [self._text(language, n, seed, drawn) for n, seed in zip(numbers, seeds, strict=True)]
        ids = [_window(ids, self.max_tokens, seed) for ids, seed in zip(self.tokenizer(texts), seeds, strict=True)]
        return self.made(ids, seeds, drawn)

    def held_out(self) -> dict[str, Made]:
        """Up to `HELD_OUT` texts of each language, always the same.

        Raises:
            UserError: damaged data.
        """
        drawn, batches = Drawn(), dict[str, Made]()
        for language, samples in self.samples.items():
            numbers = permutation(len(samples), key("held out", language))[:HELD_OUT].tolist()
            seeds = [key("held out", language, n) for n in numbers]
            batches[language] = self.batch(language, numbers, seeds, drawn)
        if drawn.corrupt:
            raise UserError(drawn.corrupt[0].reason)
        return batches

    def _text(self, language: str, number: int, seed: int, drawn: Drawn) -> str:
        for attempt in range(REPLACEMENTS):
            sample = self.samples[language][number]
            owner = int(np.searchsorted(self._first, sample, side="right")) - 1
            data, index = self.data_sets[owner], int(sample - self._first[owner])
            try:
                texts = _in_language(self.cache.sample(data, index)[1], language)
                if not texts:
                    name = data.row(index).key
                    raise ShardError(f"{data.directory}: sample {name} lacks the {language!r} that its index lists")
            except ShardError as error:
                shard, name = data.name(index)
                drawn.corrupt.append(Corrupt(str(data.directory / shard), name, str(error)))
                number = another(number, len(self.samples[language]), key("replacement", language, number, attempt))
                continue
            drawn.texts[f"{data.kind}/{data.source}/{language}"] += 1
            return texts[key(seed, "text") % len(texts)]
        raise UserError(
            f"{REPLACEMENTS} samples with texts in {language!r} in a row were of no use, the last one because: "
            f"{drawn.corrupt[-1].reason}"
        )


class TextBatches(BatchesInPieces[tuple[Made, Drawn]], Generic[Made]):
    """The batches of a stage for one rank; item n is (what `texts` make, Drawn), a function of these arguments and n
    alone.

    Languages take turns in proportion to their number of samples to the power of `masking.language_exponent`. Each goes
    through its samples in an order that is new in every epoch; of a language with fewer samples than a batch has texts,
    a batch holds some more than once, with other seeds.

    Raises:
        UserError: data without a single text.
    """

    def __init__(self, texts: Texts[Made], stage: Stage, seed: int, rank: int, world: int):
        self.texts, self.stage, self.seed, self.rank, self.world = texts, stage, seed, rank, world
        self.languages, task = list(texts.samples), stage.kind.task
        if not self.languages:
            raise UserError(f"data.{task}, {list(getattr(stage.data, task))}, holds no text; name other data sets")
        lanes = stage.data.lane_count
        orders = [SourceOrder(texts.shard_sizes[name], key(self.seed, name), lanes) for name in self.languages]
        shares = [order.samples**stage.masking.language_exponent for order in orders]
        self.sampler = TaskSampler(orders, shares, getattr(stage.batch, task), one_source=True)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What data this is: {directory of a data set: hash of its manifest}."""
        return {f"{data.kind}/{data.source}": data.fingerprint for data in self.texts.data_sets}

    def __len__(self) -> int:
        return self.stage.steps

    def state_dict(self) -> dict[str, list[int]]:
        """Empty: a batch is a function of its number alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Nothing to take."""

    def pieces(self, step: int) -> int:
        return 1

    def joined(self, step: int, pieces: Iterable[tuple[Made, Drawn]]) -> tuple[Made, Drawn]:
        ((batch, drawn),) = pieces
        drawn.fetched += newly_fetched(self.texts.data_sets)  # by the process that joins: sidecars
        return batch, drawn

    def piece(self, step: int, number: int) -> tuple[Made, Drawn]:
        language = self.languages[self.sampler.source_of(step)]
        mine = self.sampler.part(step, self.rank, self.world)
        seeds = [key(self.seed, language, draw.epoch, draw.index) for draw in mine.within(0, len(mine))]
        drawn = Drawn()
        batch = self.texts.batch(language, mine.index.tolist(), seeds, drawn)
        drawn.fetched += newly_fetched(self.texts.data_sets)
        return batch, drawn


def _by_language(data_sets: Iterable[Dataset]) -> dict[str, list[np.ndarray]]:
    """Numbers, int64, of the samples that have a text in a language, shard by shard, through all data sets. A shard has
    its place for every language, also where it has none of it, so that all languages' shards are dealt out alike."""
    data_sets = list(data_sets)
    shards = sum(len(data.shard_sizes) for data in data_sets)
    found: dict[str, list[np.ndarray]] = defaultdict(lambda: [np.zeros(0, dtype=np.int64)] * shards)
    first, number = 0, 0
    for data in data_sets:
        start = 0
        for size in data.shard_sizes:
            here: dict[str, list[int]] = defaultdict(list)
            for index in range(start, start + size):
                for language in set(data.row(index).languages):
                    here[language].append(first + index)
            for language, numbers in here.items():
                found[language][number] = np.array(numbers)
            start += size
            number += 1
        first += len(data)
    return found


def _in_language(content: dict[str, Any], language: str) -> list[str]:
    """The distinct texts of a pair or triplet in one language, in their order."""
    sides = [content["query"], content["target"], *content.get("negatives", ())]
    return list(dict.fromkeys(text["text"] for side in sides for text in side if text["language"] == language))


def _window(ids: list[int], longest: int, seed: int) -> list[int]:
    """A text's ids, if they are more than `longest` a part of them between its first and its last, `<s>` and `</s>`."""
    if len(ids) <= longest:
        return ids
    start = 1 + key(seed, "window") % (len(ids) - longest + 1)
    return [ids[0], *ids[start : start + longest - 2], ids[-1]]
