"""The samples of a batch on their way from the processes that made them: sections, pieces, and the batch again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from text_tower import PackedTokens, Tokenizer

from stage_trainer.batch import Batch
from stage_trainer.data.drawn import Drawn
from stage_trainer.data.stateless_rng import key


@dataclass
class Samples:
    """Of each sample its seed, the key of what it shows, and its source; its texts (of a frozen tower their embeddings,
    `[D]`) by their part in the batch; what was drawn for all of them; the scores of graded pairs, None of others; and
    what a teacher says of each, `[T]`, by what it says it of ("texts", "images", "captions")."""

    seeds: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    texts: dict[str, list[Any]] = field(default_factory=dict)
    drawn: Drawn = field(default_factory=Drawn)
    scores: list[float] | None = None
    teacher: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, seed: int, item: object, source: str, **texts: Sequence[Any]) -> None:
        self.seeds.append(seed)
        self.ids.append(key(item))
        self.sources.append(source)
        for part, of_part in texts.items():
            self.texts.setdefault(part, []).extend(of_part)

    def teach(self, said: Mapping[str, torch.Tensor]) -> None:
        """Adds what a teacher says of a sample."""
        for what, numbers in said.items():
            self.teacher.setdefault(what, []).append(numbers)


@dataclass(frozen=True)
class Section:
    """Samples of one kind in a piece: seeds and ids int64 `[n]`; of each part's texts the tokens, all in a row, and the
    length of each, or their embeddings, float32 `[n, D]`; of graded pairs the scores, float64 `[n]`; what a teacher
    says, float32 `[n, T]`, by what it says it of. Arrays, which travel between processes without shared memory."""

    seeds: np.ndarray
    ids: np.ndarray
    texts: dict[str, tuple[np.ndarray, np.ndarray]]
    drawn: Drawn
    scores: np.ndarray | None
    teacher: dict[str, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """Some of a batch's samples; pixels `[1 + V, n, 3, R, R]` with V views or hard-negative images and their seeds
    `[V, n]`."""

    images: Section
    pixels: torch.Tensor | None
    view_seeds: np.ndarray
    pairs: Section


def section_of(samples: Samples, tokenizer: Tokenizer, max_tokens: int) -> Section:
    """Tokenises, and cuts texts to `max_tokens`; what was drawn gets how many that were."""
    texts = {}
    for part, given in samples.texts.items():
        if not given:
            continue
        if isinstance(given[0], torch.Tensor):
            texts[part] = torch.stack(given).numpy(), np.zeros(len(given), np.int64)
            continue
        found = tokenizer(given, max_length=None)
        sources = [name for name in samples.sources for _ in range(len(given) // len(samples.sources))]
        samples.drawn.cut.update(name for name, ids in zip(sources, found, strict=True) if len(ids) > max_tokens)
        short = [shortened(ids, max_tokens) for ids in found]
        lengths = np.fromiter(map(len, short), np.int64, len(short))
        texts[part] = np.fromiter(chain.from_iterable(short), np.int64, int(lengths.sum())), lengths
        samples.drawn.tokens += int(lengths.sum())
        samples.drawn.squared_tokens += int((lengths**2).sum())
    seeds, ids = (np.array(numbers, dtype=np.int64) for numbers in (samples.seeds, samples.ids))
    scores = None if samples.scores is None else np.array(samples.scores, dtype=np.float64)
    teacher = {what: torch.stack(said).numpy() for what, said in samples.teacher.items()}
    return Section(seeds, ids, texts, samples.drawn, scores, teacher)


def shortened(ids: list[int], longest: int) -> list[int]:
    """A text's ids, of which at most `longest` stay: the first ones and `</s>`, as `Tokenizer` does with max_length."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]


def batch_of(pieces: Iterable[Piece], images: int, negatives: int, image_negatives: int = 0) -> tuple[Batch, Drawn]:
    """A batch of so many images, with so many hard negatives for each pair (images: for each caption), from its pieces
    in their order. Pixels are copied as soon as a piece is there, which frees its shared memory for the next one."""
    found, pixels, filled = list[Piece](), None, 0
    for piece in pieces:
        if piece.pixels is not None:
            if pixels is None:
                views, _, *size = piece.pixels.shape
                pixels = piece.pixels.new_empty(views, images, *size)
            count = piece.pixels.shape[1]
            pixels[:, filled : filled + count] = piece.pixels
            filled += count
        found.append(replace(piece, pixels=None))
    drawn = Drawn()
    of_images, of_pairs = [piece.images for piece in found], [piece.pairs for piece in found]
    sections = [*of_images, *of_pairs]
    for section in sections:
        drawn.add(section.drawn)
    view_seeds = np.concatenate([piece.view_seeds for piece in found], axis=1).flatten()
    seeds, pair_seeds = (np.concatenate([section.seeds for section in of]) for of in (of_images, of_pairs))
    captioned = seeds if any("caption" in section.texts for section in of_images) else seeds[:0]
    hard_seeds = np.repeat(pair_seeds, negatives)
    parts = {"caption": captioned, "query": pair_seeds, "target": pair_seeds, "negative": hard_seeds}
    text_seeds = [key(seed, part, i) for part, of in parts.items() for i, seed in enumerate_within(of.tolist())]
    scores = [section.scores for section in of_pairs if section.scores is not None]
    taught = dict.fromkeys(what for section in sections for what in section.teacher)
    batch = Batch(
        images=None if pixels is None else pixels.flatten(0, 1),
        image_seeds=torch.from_numpy(np.concatenate([seeds, view_seeds])),
        image_ids=torch.from_numpy(np.concatenate([section.ids for section in of_images])),
        texts=_texts_of(sections, list(parts)),
        text_seeds=torch.tensor(text_seeds, dtype=torch.int64),
        pairs=len(pair_seeds),
        negatives=negatives,
        text_ids=torch.from_numpy(np.concatenate([section.ids for section in of_pairs])),
        scores=torch.from_numpy(np.concatenate(scores)) if scores else None,
        teacher={
            what: torch.from_numpy(np.concatenate([of.teacher[what] for of in sections if what in of.teacher]))
            for what in taught
        },
        image_negatives=image_negatives,
    )
    return batch, drawn


def _texts_of(sections: list[Section], parts: list[str]) -> PackedTokens | torch.Tensor | None:
    """The texts of all sections, part by part."""
    found = [section.texts[part] for part in parts for section in sections if part in section.texts]
    if not found:
        return None
    if found[0][0].ndim == 2:
        return torch.from_numpy(np.concatenate([embeddings for embeddings, _ in found]))
    lengths = np.concatenate([of for _, of in found])
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in found]))
    return PackedTokens(ids, torch.from_numpy(bounds), int(lengths.max()))


def enumerate_within(seeds: list[int]) -> Iterator[tuple[int, int]]:
    """(equal seeds directly before, seed): numbers a sample's own negatives, whatever stands before them."""
    run, previous = 0, None
    for seed in seeds:
        run = run + 1 if seed == previous else 0
        previous = seed
        yield run, seed
