"""From a global batch's draws to one rank's tensors: read, decode, augment, choose texts, tokenise, pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from data_prep.shards import Dataset, ShardError, ShardUnavailable
from text_tower import Tokenizer
from vision_tower import ImageError, augment, simclr_view

from stage_trainer.batch import Batch
from stage_trainer.data import hard_negatives
from stage_trainer.data.config import DataConfig
from stage_trainer.data.drawn import Corrupt, Drawn, Position
from stage_trainer.data.file_checks import FileChecks
from stage_trainer.data.frozen_images import FrozenImages, view, view_seed
from stage_trainer.data.frozen_texts import FrozenTexts
from stage_trainer.data.hard_negatives import check_as_many
from stage_trainer.data.lanes import SourceOrder
from stage_trainer.data.look_ahead import check_room, choose_ranges, look_ahead, newly_fetched
from stage_trainer.data.opening import open_source
from stage_trainer.data.pieces import IMAGES, PIECE, BatchesInPieces
from stage_trainer.data.sampler import Draw, Draws, TaskSampler
from stage_trainer.data.samples import REPLACEMENTS, SampleCache, TextsAlone, replacement
from stage_trainer.data.sections import Piece, Samples, batch_of, section_of
from stage_trainer.data.stateless_rng import key
from stage_trainer.data.streamed import StreamedShards, streamed_sources
from stage_trainer.data.taught import Taught, with_said
from stage_trainer.errors import UserError
from stage_trainer.recipe import Source, Stage

ImageSource = Dataset | StreamedShards


class StageBatches(BatchesInPieces[tuple[Batch, Drawn]]):
    """The batches of a stage for one rank; item n is (Batch, Drawn).

    Every item is a function of these arguments and n alone, so any worker may make it, at any time, again. A sample
    that cannot be read or is of no use is replaced by another of its source, always the same one.

    Raises:
        UserError: a data set that is missing or damaged, of a wrong kind, or smaller than one batch.
    """

    def __init__(self, data: DataConfig, stage: Stage, seed: int, tokenizer: Tokenizer, rank: int, world: int):
        self.stage, self.seed, self.rank, self.world = stage, seed, rank, world
        self.tokenizer = tokenizer
        negatives = not stage.only_embeds("image_text")
        self.cache = SampleCache(data.cache_megabytes, data.max_pixels, negatives=negatives)
        # What is read in the place of pixels, and from the disk beside them and texts; set by the task.
        self.frozen: FrozenImages | TextsAlone | None = TextsAlone() if "images" in stage.unread else None
        self.taught: Sequence[Taught] = ()
        self.frozen_texts: FrozenTexts | None = None
        self.inference: dict[str, Any] = {}  # how its images come to their size, as the tower says; set by `prepare`
        self.workers = data.workers
        self._positions: dict[tuple[int, int], Position] = {}
        self._last: dict[int, tuple[int, Draws]] = {}  # by sampler: a step's draws for all of its pieces
        streamed = streamed_sources(data, stage.data.image_text, seed, stage.data.lane_count)
        self.image_sources = [
            streamed.get(number) or open_source(data, source, stage.batch.image_text, ("image-",))
            for number, source in enumerate(stage.data.image_text)
        ]
        self.text_sources = [open_source(data, s, stage.batch.text, ("text-",)) for s in stage.data.text]
        self.files = FileChecks([*self.indexed_images, *self.text_sources])
        if len({source.kind for source in self.text_sources}) > 1:
            raise UserError("data.text mixes pairs and triplets; a stage takes one kind, because their losses differ")
        self.graded = [data for data, source in zip(self.text_sources, stage.data.text, strict=True) if source.graded]
        if self.graded and self.graded[0].kind != "text-pairs":
            raise UserError(
                f"{self.graded[0].directory} is 'graded' and holds {self.graded[0].kind}; expected text-pairs"
            )
        self.hard_negatives = hard_negatives.of_texts(stage, self.text_sources, self.cache)
        self.image_negatives = hard_negatives.of_images(stage, self.image_sources, self.cache)
        contrasted = stage.loss.kind == "multi_task" and not stage.only_embeds("text")
        if stage.batch.text == 1 and not self.hard_negatives and contrasted:
            raise UserError("batch.text is 1, and a single pair has no negatives; raise it, or name triplets")
        self.image_sampler = self._sampler(stage.data.image_text, self.image_sources, stage.batch.image_text, False)
        self.text_sampler = self._sampler(stage.data.text, self.text_sources, stage.batch.text, True)
        for sources, sampler, first in (
            (self.image_sources, self.image_sampler, stage.task_start.image_text),
            (self.text_sources, self.text_sampler, stage.task_start.text),
        ):
            lines = choose_ranges(sources, sampler, max(0, stage.steps - first)) if sampler and not stage.stored else ()
            for line in lines if rank == 0 else ():
                print(line, flush=True)
        read: list[tuple[Sequence[ImageSource], TaskSampler | None]]
        read = [(self.image_sources, self.image_sampler), (self.text_sources, self.text_sampler)]
        check_room(data.remote, read, rank, world)

    @property
    def indexed_images(self) -> list[Dataset]:
        """The image sources that have sidecars."""
        return [data for data in self.image_sources if isinstance(data, Dataset)]

    def _sampler(
        self, sources: tuple[Source, ...], sets: Sequence[ImageSource], batch: int, one: bool
    ) -> TaskSampler | None:
        if not batch:
            return None
        # The same data set may stand twice, with other settings: each has an order of its own.
        lanes = self.stage.data.lane_count
        orders = [
            SourceOrder(s.shards["samples"], key(self.seed, s.source, s.kind, i), lanes)
            if isinstance(s, Dataset)
            else s.order
            for i, s in enumerate(sets)
        ]
        return TaskSampler(orders, [s.rate for s in sources], batch, one_source=one)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What data this is: {directory of a data set: hash of its manifest, and who its teacher was}."""
        found = {}
        for data in [*self.image_sources, *self.text_sources]:
            teachers = [taught.said_by(data) for taught in self.taught if isinstance(data, Dataset)]
            found[_name(data)] = ", taught by ".join([data.fingerprint, *filter(None, teachers)])
        return found

    def __len__(self) -> int:
        return self.stage.steps

    def state_dict(self) -> dict[str, list[int]]:
        """{source/lane: `Position`}: what the next batches need beside their numbers, of the lanes that this rank read.
        Of data sets with sidecars nothing is needed."""
        return {f"{source}/{lane}": list(position) for (source, lane), position in self._positions.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Where lanes go on from, whichever rank read them before."""
        for name, position in state.items():
            source, lane = map(int, name.split("/"))
            self._go_on({(source, lane): Position(*position)})

    def _go_on(self, positions: Mapping[tuple[int, int], Position]) -> None:
        """Also processes that load data and are begun later know these positions."""
        self._positions |= positions
        for (source, lane), position in positions.items():
            data = self.image_sources[source]
            assert isinstance(data, StreamedShards)
            data.go_on(lane, position)

    def pieces(self, step: int) -> int:
        images = self._size(step, "image_text")
        most = PIECE // self._image_bytes(step)
        count = -(-images // max(1, most if self.frozen else min(IMAGES, most))) if images else 1
        if images and len(self.indexed_images) < len(self.image_sources):
            # Then a piece has much the same lanes in every step, and is always made by the process that has them open.
            count = -(-count // max(1, self.workers)) * max(1, self.workers)
        return count

    def piece_bytes(self, step: int) -> int:
        return self._image_bytes(step) * -(-self._size(step, "image_text") // self.pieces(step))

    def _image_bytes(self, step: int) -> int:
        """Of an image with its views or hard negatives; of an embedding, whose width is not known here, or of what has
        none, what a wide one has."""
        if self.frozen:
            return 2**14
        return 3 * self.stage.resolution_at(step) ** 2 * (1 + self.stage.loss.views + self.image_negatives)

    def _size(self, step: int, kind: str) -> int:
        """How many of a step's samples are this rank's."""
        return len(range(self.rank, self.stage.batch_at(step).get(kind, 0), self.world))

    def piece(self, step: int, number: int) -> Piece:
        """This rank's samples number·n/N to (number + 1)·n/N of a step, for N pieces."""
        kinds, share = self.stage.batch_at(step), (number, self.pieces(step))
        images, pixels, seeds = self._images(step, share) if "image_text" in kinds else (Samples(), None, [])
        pairs = self._pairs(step, share) if "text" in kinds else Samples()
        of_views = np.array(seeds, dtype=np.int64).reshape(len(seeds), len(images.seeds))
        images.drawn.fetched += newly_fetched([*self.image_sources, *self.text_sources])
        of_images, of_pairs = (section_of(of, self.tokenizer, self.stage.max_tokens) for of in (images, pairs))
        return Piece(of_images, pixels, of_views, of_pairs)

    def _images(self, step: int, share: tuple[int, int]) -> tuple[Samples, torch.Tensor | None, list[list[int]]]:
        """A share of this rank's captioned images of a step: (samples, pixels, seeds of the views, or of the
        hard-negative images)."""
        found, views, pixels = Samples(), self.stage.loss.views or self.image_negatives, None
        seeds: list[list[int]] = [[] for _ in range(views)]
        start, size = self.stage.task_start.image_text, self.stage.resolution_at(step)
        draws = self._draws(self.image_sampler, self.image_sources, step - start, share)
        for row, draw in enumerate(draws):
            data = self.image_sources[draw.source]
            index, decoded, content = self._sample(data, draw.index, found.drawn, self.frozen or self.cache)
            seed = self._seed(data, draw)
            if decoded is not None:
                of_views = view_seed(self.seed, data, index)
                shown = self._shown(decoded, size, seed, of_views)
                if pixels is None:
                    pixels = shown.new_empty(1 + views, len(draws), *shown.shape)
                pixels[0, row] = shown
                for number, of_all in enumerate(seeds):
                    if self.image_negatives:
                        of_all.append(key(seed, "negative image", number))
                        further = content["negative_images"][number]
                        of_negative = key(of_views, "negative", number)
                        pixels[1 + number, row] = self._shown(further, size, of_all[-1], of_negative)
                        continue
                    of_all.append(key(seed, "view", number))
                    pixels[1 + number, row] = simclr_view(decoded, of_all[-1], size, flip=self.stage.augmentation.flip)
            self._add_captioned(found, data, seed, content)
        return found, pixels, seeds

    def _add_captioned(self, found: Samples, data: ImageSource, seed: int, content: dict[str, Any]) -> None:
        """Adds a captioned image: one of its captions, if a loss reads it, and what a teacher says."""
        read = self.stage.reads("captions")
        captions = [self._choose(content["captions"], seed, data, found.drawn)] if read else []
        found.add(seed, content["item"], _name(data), caption=[caption[self._form] for caption in captions])
        # Nothing is said of streamed shards, whose own JSON may have that name.
        for taught in [content, *captions] if self.taught and isinstance(data, Dataset) else ():
            found.teach(taught["teacher"])

    def _shown(self, decoded: torch.Tensor, size: int, seed: int, of_views: int) -> torch.Tensor:
        """What a step gets of an image: uint8 `[3, R, R]`, or of a frozen tower the embedding `[D]`.

        Args:
            decoded: the pixels, or the embeddings of its fixed views.
            seed: of this draw; of_views: of the fixed views.
        """
        a = self.stage.augmentation
        number = key(seed, "view") % a.views if a.views else 0
        if self.frozen:
            return decoded[number]
        if a.views:
            return view(decoded, size, a, of_views, number, self.inference)
        return augment(decoded, seed, size, scale=a.scale, ratio=a.ratio, flip=a.flip, color=a.color)

    def _pairs(self, step: int, share: tuple[int, int]) -> Samples:
        """A share of this rank's text pairs of a step."""
        found, start = Samples(), self.stage.task_start.text
        assert self.text_sampler is not None  # batch_at guarantees it
        if self.stage.data.text[self.text_sampler.source_of(step - start)].graded:  # the whole batch is, or nothing
            found.scores = []
        for draw in self._draws(self.text_sampler, self.text_sources, step - start, share):
            data = self.text_sources[draw.source]
            _, _, content = self._sample(data, draw.index, found.drawn, self.cache)
            seed = self._seed(data, draw)
            query, target, hard = self._texts(content, seed, draw.source, found.drawn)
            found.add(seed, content["item"], _name(data), query=[query], target=[target], negative=hard)
            if found.scores is not None:
                found.scores.append(content["score"])
            if self.taught:
                found.teach(content["teacher"])
        return found

    def joined(self, step: int, pieces: Iterable[Piece]) -> tuple[Batch, Drawn]:
        self.files.raise_fault()
        batch, drawn = batch_of(pieces, self._size(step, "image_text"), self.hard_negatives, self.image_negatives)
        self._go_on(drawn.positions)
        drawn.fetched += newly_fetched([*self.image_sources, *self.text_sources])  # by the process that joins
        # A rank with no sample of a task takes part in its loss, too.
        nothing = {taught.of: torch.zeros(0, taught.width) for taught in self.taught if taught.of not in batch.teacher}
        return replace(batch, teacher={**batch.teacher, **nothing}), drawn

    def _draws(
        self, sampler: TaskSampler | None, sources: Sequence[ImageSource], number: int, share: tuple[int, int]
    ) -> list[Draw]:
        """A share of this rank's part of a task's batch; what the next ones need is fetched from now on."""
        assert sampler is not None  # batch_at guarantees it
        if self._last.get(id(sampler), (None,))[0] != number:
            self._last[id(sampler)] = number, sampler.part(number, self.rank, self.world)
            look_ahead(sources, sampler, number, self.rank, self.world)
        draws, (i, of) = self._last[id(sampler)][1], share
        return draws.within(len(draws) * i // of, len(draws) * (i + 1) // of)

    def _sample(
        self, data: ImageSource, index: int, drawn: Drawn, samples: SampleCache | FrozenImages | TextsAlone
    ) -> tuple[int, torch.Tensor | None, dict[str, Any]]:
        """(its number, pixels, texts) of a sample, or of the one that takes its place."""
        if isinstance(data, StreamedShards):
            return index, *data.sample(index, drawn)
        for attempt in range(REPLACEMENTS):
            try:
                pixels, content = samples.sample(data, index)
                if self.frozen_texts and data.directory in self.frozen_texts.stores:
                    content = self.frozen_texts.attached(data, index, content)
                content = with_said(self.taught, data, index, content) if self.taught else content
                self._check(data, index, content)
                return index, pixels, content
            except (ShardError, ImageError) as error:
                shard, name = data.name(index)
                drawn.corrupt.append(Corrupt(str(data.directory / shard), name, str(error)))
                index = replacement(data, index, attempt, isinstance(error, ShardUnavailable))
        raise UserError(
            f"{data.directory}: {REPLACEMENTS} samples in a row were of no use, the last one because: "
            f"{drawn.corrupt[-1].reason}"
        )

    def _check(self, data: Dataset, index: int, content: dict[str, Any]) -> None:
        """What a triplet or a graded pair needs in this stage."""
        images = data.kind.startswith("image-")
        check_as_many(data, index, content, self.image_negatives if images else self.hard_negatives)
        if "score" not in content and any(data is graded for graded in self.graded):
            raise ShardError(
                f"{data.directory}: sample {data.row(index).key} has no score, and the recipe says 'graded'"
            )

    def _seed(self, data: ImageSource, draw: Draw) -> int:
        return key(self.seed, data.kind, data.source, draw.epoch, draw.index)

    @property
    def _form(self) -> str:
        """What a batch has of a text: itself, or a frozen tower's embedding."""
        return "embedding" if self.frozen_texts else "text"

    def _texts(self, content: dict[str, Any], seed: int, source: int, drawn: Drawn) -> tuple[Any, Any, list[Any]]:
        """A query, its target (other words, in the language that the recipe wants) and its hard negatives, in the
        batch's form."""
        data, language = self.text_sources[source], self.stage.data.text[source].target_language
        query, form = self._choose(content["query"], seed, data, drawn), self._form
        others = [t for t in content["target"] if t["text"] != query["text"]] or content["target"]
        wanted = [t for t in others if t["language"] == language] or others
        target = self._choose(wanted, key(seed, "target"), data, drawn)[form]
        hard = [
            self._choose(alternatives, key(seed, "negative", i), data, drawn)[form]
            for i, alternatives in enumerate(content["negatives"] if self.hard_negatives else [])
        ]
        return query[form], target, hard

    def _choose(self, alternatives: list[dict[str, Any]], seed: int, data: ImageSource, drawn: Drawn) -> dict[str, Any]:
        text = alternatives[key(seed, "text") % len(alternatives)]
        drawn.texts[f"{_name(data)}/{text['language']}"] += 1
        if self.frozen_texts and text["cut"]:  # of others the tokens say it
            drawn.cut[_name(data)] += 1
        return text


def _name(data: ImageSource) -> str:
    return f"{data.kind}/{data.source}"
