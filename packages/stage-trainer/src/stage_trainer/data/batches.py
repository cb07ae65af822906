"""From a global batch's draws to one rank's tensors: read, decode, augment, choose texts, tokenise, pack."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from data_prep.shards import Dataset, ShardError, ShardUnavailable
from text_tower import PackedTokens, Tokenizer
from torch.utils.data import Dataset as TorchDataset
from vision_tower import ImageError, augment, simclr_view

from stage_trainer.batch import Batch
from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote_data import RemotePlace, check_room, look_ahead, open_place, place
from stage_trainer.data.sampler import Draw, SourceOrder, TaskSampler, slice_of
from stage_trainer.data.samples import SampleCache, shard_errors_explained
from stage_trainer.data.stateless_rng import key
from stage_trainer.errors import UserError
from stage_trainer.recipe import Source, Stage

REPLACEMENTS = 16
"""So many samples in a row may be corrupt before a source is given up."""


@dataclass(frozen=True)
class Corrupt:
    """A sample that was replaced: an entry of the ledger."""

    shard: str
    key: str
    reason: str


@dataclass
class Drawn:
    """What went into a rank's part of a batch: texts by kind/source/language, how many of them `max_tokens` cut by
    kind/source, the sum of their tokens and that of the squares (attention's share), and samples that had to be
    replaced."""

    texts: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    squared_tokens: int = 0
    corrupt: list[Corrupt] = field(default_factory=list)

    def count_tokens(self, texts: PackedTokens | None) -> None:
        for length in texts.lengths if texts is not None else ():
            self.tokens += length
            self.squared_tokens += length**2

    def of_sources(self, sources: Sequence[str]) -> list[int]:
        """Texts from each of `sources` (kind/source), and then how many of these were cut."""
        drawn = Counter[str]()
        for name, count in self.texts.items():
            drawn[name.rpartition("/")[0]] += count
        return [*(drawn[source] for source in sources), *(self.cut[source] for source in sources)]


@dataclass
class _Samples:
    """Of each sample its seed, the key of what it shows, and its source."""

    seeds: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def add(self, data: Dataset, seed: int, content: dict[str, Any]) -> None:
        self.seeds.append(seed)
        self.ids.append(key(content["item"]))
        self.sources.append(_name(data))


@dataclass
class _Images(_Samples):
    """Captioned images; `views` are those of a unified loss, (pixels, seed) of all images for each."""

    pixels: list[torch.Tensor] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    views: list[list[tuple[torch.Tensor, int]]] = field(default_factory=list)


@dataclass
class _Pairs(_Samples):
    """Pairs of texts, and the hard negatives of all of them in a row."""

    queries: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)


class StageBatches(TorchDataset[tuple[Batch, Drawn]]):
    """The batches of a stage for one rank; item n is (Batch, Drawn).

    Every item is a function of these arguments and n alone, so any worker may make it, at any time, again. A sample
    that cannot be read or is of no use is replaced by another of its source, always the same one.

    Raises:
        UserError: a data set that is missing or damaged, of a wrong kind, or smaller than one batch.
    """

    def __init__(self, data: DataConfig, stage: Stage, seed: int, tokenizer: Tokenizer, rank: int, world: int):
        self.stage, self.seed, self.rank, self.world = stage, seed, rank, world
        self.tokenizer = tokenizer
        self.cache = SampleCache(data.cache_megabytes, data.max_pixels)
        self.image_sources = [_open(data, s, stage.batch.image_text, ("image-",)) for s in stage.data.image_text]
        self.text_sources = [_open(data, s, stage.batch.text, ("text-",)) for s in stage.data.text]
        if len({source.kind for source in self.text_sources}) > 1:
            raise UserError("data.text mixes pairs and triplets; a stage takes one kind, because their losses differ")
        self.hard_negatives = self._hard_negatives()
        if stage.loss.kind == "unified" and self.hard_negatives:
            raise UserError(
                "a unified loss has no place for the hard negatives of triplets; name text pairs in data.text"
            )
        if stage.batch.text == 1 and not self.hard_negatives and stage.loss.kind == "multi_task":
            raise UserError("batch.text is 1, and a single pair has no negatives; raise it, or name triplets")
        self.image_sampler = self._sampler(stage.data.image_text, self.image_sources, stage.batch.image_text, False)
        self.text_sampler = self._sampler(stage.data.text, self.text_sources, stage.batch.text, True)
        check_room(data.remote, [(self.image_sources, self.image_sampler), (self.text_sources, self.text_sampler)])

    def _sampler(self, sources: tuple[Source, ...], sets: list[Dataset], batch: int, one: bool) -> TaskSampler | None:
        if not batch:
            return None
        # The same data set may stand twice, with other settings: each has an order of its own.
        orders = [SourceOrder(s.shard_sizes, key(self.seed, s.source, s.kind, i)) for i, s in enumerate(sets)]
        return TaskSampler(orders, [s.rate for s in sources], batch, one_source=one)

    def _hard_negatives(self) -> int:
        """K of the stage's triplets, as the first sample of the first source has it; 0 for pairs."""
        if not (self.text_sources and self.text_sources[0].kind == "text-triplets"):
            return 0
        data = self.text_sources[0]
        for index in range(min(REPLACEMENTS, len(data))):
            with contextlib.suppress(ShardError):  # it is entered in the ledger when it is drawn
                return len(self.cache.sample(data, index)[1]["negatives"])
        raise UserError(f"{data.directory}: none of its first {REPLACEMENTS} triplets can be read")

    @property
    def fingerprint(self) -> dict[str, str]:
        """What data this is: {directory of a data set: hash of its manifest}."""
        return {_name(d): d.fingerprint for d in [*self.image_sources, *self.text_sources]}

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> tuple[Batch, Drawn]:
        drawn, kinds = Drawn(), self.stage.batch_at(step)
        images = self._images(step, drawn) if "image_text" in kinds else _Images()
        pairs = self._pairs(step, drawn) if "text" in kinds else _Pairs()
        given = [*images.captions, *pairs.queries, *pairs.targets, *pairs.negatives]
        texts = self.tokenizer(given, max_length=None)
        of_negatives = [name for name in pairs.sources for _ in range(self.hard_negatives)]
        sources = [*images.sources, *pairs.sources, *pairs.sources, *of_negatives]
        drawn.cut.update(n for n, ids in zip(sources, texts, strict=True) if len(ids) > self.stage.max_tokens)
        batch = self._pack(images, pairs, [shortened(ids, self.stage.max_tokens) for ids in texts])
        drawn.count_tokens(batch.texts)
        return batch, drawn

    def _images(self, step: int, drawn: Drawn) -> _Images:
        """This rank's captioned images of a step."""
        found = _Images(views=[[] for _ in range(self.stage.loss.views)])
        start, size, a = self.stage.task_start.image_text, self.stage.resolution_at(step), self.stage.augmentation
        for draw in self._draws(self.image_sampler, self.image_sources, step - start):
            data = self.image_sources[draw.source]
            pixels, content = self._sample(data, draw.index, drawn)
            seed = self._seed(data, draw)
            assert pixels is not None  # content_of guarantees it
            found.pixels.append(augment(pixels, seed, size, scale=a.scale, ratio=a.ratio, flip=a.flip, color=a.color))
            for number, of_all in enumerate(found.views):
                of_view = key(seed, "view", number)
                of_all.append((simclr_view(pixels, of_view, size, flip=a.flip), of_view))
            found.captions.append(self._choose(content["captions"], seed, data, drawn)["text"])
            found.add(data, seed, content)
        return found

    def _pairs(self, step: int, drawn: Drawn) -> _Pairs:
        """This rank's text pairs of a step."""
        found, start = _Pairs(), self.stage.task_start.text
        for draw in self._draws(self.text_sampler, self.text_sources, step - start):
            data = self.text_sources[draw.source]
            _, content = self._sample(data, draw.index, drawn)
            seed = self._seed(data, draw)
            query, target, hard = self._texts(content, seed, draw.source, drawn)
            found.queries.append(query)
            found.targets.append(target)
            found.negatives += hard
            found.add(data, seed, content)
        return found

    def _draws(self, sampler: TaskSampler | None, sources: list[Dataset], number: int) -> list[Draw]:
        """This rank's part of a task's batch; what the next ones need is fetched from now on."""
        assert sampler is not None  # batch_at guarantees it
        draws = slice_of(sampler.batch_at(number), self.rank, self.world)
        look_ahead(sources, sampler)
        return draws

    def _sample(self, data: Dataset, index: int, drawn: Drawn) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """(pixels, texts) of a sample, or of the one that takes its place."""
        for attempt in range(REPLACEMENTS):
            try:
                pixels, content = self.cache.sample(data, index)
                self._check(data, index, content)
                return pixels, content
            except (ShardError, ImageError) as error:
                shard, name = data.name(index)
                drawn.corrupt.append(Corrupt(str(data.directory / shard), name, str(error)))
                index = _replacement(data, index, attempt, isinstance(error, ShardUnavailable))
        raise UserError(
            f"{data.directory}: {REPLACEMENTS} samples in a row were of no use, the last one because: "
            f"{drawn.corrupt[-1].reason}"
        )

    def _check(self, data: Dataset, index: int, content: dict[str, Any]) -> None:
        """What a triplet needs in this stage."""
        found = len(content.get("negatives", ()))
        if data.kind == "text-triplets" and found != self.hard_negatives:
            raise ShardError(
                f"{data.directory}: sample {data.row(index).key} has {found} negatives; the first triplet of "
                f"{self.text_sources[0].directory} has {self.hard_negatives}, and all triplets of a stage need as many"
            )

    def _seed(self, data: Dataset, draw: Draw) -> int:
        return key(self.seed, data.kind, data.source, draw.epoch, draw.index)

    def _texts(self, content: dict[str, Any], seed: int, source: int, drawn: Drawn) -> tuple[str, str, list[str]]:
        """A query, its target (other words, in the language that the recipe wants) and its hard negatives."""
        data, language = self.text_sources[source], self.stage.data.text[source].target_language
        query = self._choose(content["query"], seed, data, drawn)["text"]
        others = [t for t in content["target"] if t["text"] != query] or content["target"]
        wanted = [t for t in others if t["language"] == language] or others
        target = self._choose(wanted, key(seed, "target"), data, drawn)["text"]
        hard = [
            self._choose(alternatives, key(seed, "negative", i), data, drawn)["text"]
            for i, alternatives in enumerate(content.get("negatives", []))
        ]
        return query, target, hard

    @staticmethod
    def _choose(alternatives: list[dict[str, Any]], seed: int, data: Dataset, drawn: Drawn) -> dict[str, Any]:
        text = alternatives[key(seed, "text") % len(alternatives)]
        drawn.texts[f"{_name(data)}/{text['language']}"] += 1
        return text

    def _pack(self, images: _Images, pairs: _Pairs, texts: list[list[int]]) -> Batch:
        per_negative = [s for s in pairs.seeds for _ in range(self.hard_negatives)]
        sections = {"caption": images.seeds, "query": pairs.seeds, "target": pairs.seeds, "negative": per_negative}
        seeds = [key(seed, name, i) for name, part in sections.items() for i, seed in enumerate_within(part)]
        views = list(chain.from_iterable(images.views))
        pixels = [*images.pixels, *(view for view, _ in views)]
        return Batch(
            images=torch.stack(pixels) if pixels else None,
            image_seeds=torch.tensor([*images.seeds, *(seed for _, seed in views)], dtype=torch.int64),
            image_ids=torch.tensor(images.ids, dtype=torch.int64),
            texts=PackedTokens.from_lists(texts) if texts else None,
            text_seeds=torch.tensor(seeds, dtype=torch.int64),
            pairs=len(pairs.ids),
            negatives=self.hard_negatives,
            text_ids=torch.tensor(pairs.ids, dtype=torch.int64),
        )


def shortened(ids: list[int], longest: int) -> list[int]:
    """A text's ids, of which at most `longest` stay: the first ones and `</s>`, as `Tokenizer` does with max_length."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]


def _name(data: Dataset) -> str:
    return f"{data.kind}/{data.source}"


def enumerate_within(seeds: list[int]) -> Iterator[tuple[int, int]]:
    """(equal seeds directly before, seed): numbers a sample's own negatives, whatever stands before them."""
    run, previous = 0, None
    for seed in seeds:
        run = run + 1 if seed == previous else 0
        previous = seed
        yield run, seed


def _replacement(data: Dataset, index: int, attempt: int, whole_shard: bool) -> int:
    """The sample that takes the place of `index`: another of its shard, which is at hand; where that did not help, or
    there is none, one of another shard, the same for all of its samples, so that a shard that is gone does not cost
    many others. It is `index` itself in a data set of one sample alone."""
    shard = data.shard_of(index)
    seed = key("replacement", data.kind, data.source, attempt)
    if whole_shard or attempt > 1 or len(data.samples_of(shard)) == 1:
        shard = another(shard, len(data.shard_sizes), key(seed, shard))
    samples = data.samples_of(shard)
    if index not in samples:
        return samples[key(seed, index) % len(samples)]
    return samples[another(index - samples.start, len(samples), key(seed, index))]


def another(number: int, count: int, draw: int) -> int:
    """One of `count` numbers, drawn, but not `number`; that one if there is no other."""
    return (number + 1 + draw % max(1, count - 1)) % count


def open_data_set(directory: Path | RemotePlace, kinds: tuple[str, ...]) -> Dataset:
    """A data set of one of `kinds` (the beginnings of their names).

    Raises:
        UserError: it is missing, damaged or of another kind.
    """
    with shard_errors_explained():
        data = open_place(directory)
    if not data.kind.startswith(kinds):
        raise UserError(f"{data.directory} holds {data.kind}, which cannot serve here; expected {kinds[0]}…")
    return data


def _open(config: DataConfig, source: Source, batch: int, kinds: tuple[str, ...]) -> Dataset:
    data = open_data_set(place(config, "train", source.path), kinds)
    if len(data) < batch:
        raise UserError(
            f"{data.directory} has {len(data)} samples, too few for one batch of {batch}; "
            "lower the batch size or add data"
        )
    return data
