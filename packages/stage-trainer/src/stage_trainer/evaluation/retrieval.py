"""Evaluation on pools of images: recall@5 of captioned images in each direction, nDCG@5 of pages that answer queries,
for every language and Matryoshka dim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_prep.shards import Dataset, ShardError
from vision_tower.preprocess import check_image

from stage_trainer.data.remote_data import RemotePlace, open_place
from stage_trainer.data.samples import image_of, shard_errors_explained, texts_of
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.ranks import content_together, part_of, rows_together
from stage_trainer.metrics.rescoring import Index, exact
from stage_trainer.metrics.retrieval import chance_at_k, ndcg_at_k, recall_at_k, unit
from stage_trainer.recipe.limits import MAX_PIXELS

K = 5
MAX_TOKENS = 512  # of a text, even if the tower takes more: the default of the published jina-clip-v2
BATCH = 256  # images or texts
DIRECTIONS = ("text→image", "image→text", "text→English text")

Scores = dict[str, dict[str, dict[str, float]]]
"""direction → dim → language (and "mean") → recall@5 (or nDCG@5), between 0 and 1."""


@dataclass(frozen=True)
class Pool:
    """Held-out images with their captions: `texts[language]` is [(image number, text), …], by image.

    `documents`: the images are pages, and the texts are queries that they answer. `images` are those with the numbers
    `own`, the part of a rank; None: all of them. `data` has the others.
    """

    name: str
    images: list[bytes]
    texts: dict[str, list[tuple[int, str]]]
    documents: bool = False
    own: range | None = None
    data: Dataset | None = field(default=None, repr=False)

    @classmethod
    @shard_errors_explained()
    def open(
        cls, directory: str | Path | RemotePlace, max_pixels: int = MAX_PIXELS, share: tuple[int, int] = (0, 1)
    ) -> Pool:
        """Reads a data set of images with captions. Captions without a role or with the role "name" or "query" count,
        in a data set of long captions also those with the role "long".

        Args:
            share: (i, n): the i-th of n parts of the samples is read here, and the others on other ranks, which have to
                call, too; every rank gets all texts.

        Raises:
            UserError: the data set is missing, damaged or has no such captions; a sample has no image or no captions.
            ImageError: an image that its header shows to be none, or to have more than `max_pixels`.
        """
        if share[1] == 1:
            data = open_place(directory)
            images, part = _read_part(data, range(len(data)), max_pixels)
            return cls._of(data, images, [part], None)
        try:
            data = open_place(directory)
            own = part_of(len(data), *share)
            images, part = _read_part(data, own, max_pixels)
        except (ShardError, OSError, ValueError) as error:
            content_together(None, error, share[1])  # raises; the other ranks wait for this one's part
            raise
        return cls._of(data, images, content_together(part, None, share[1]), own)

    @classmethod
    def _of(cls, data: Dataset, images: list[bytes], parts: Sequence[Mapping[str, Any]], own: range | None) -> Pool:
        texts: dict[str, list[tuple[int, str]]] = {}
        for number, language, text in (caption for part in parts for caption in part["captions"]):
            texts.setdefault(language, []).append((number, text))
        if not texts:
            other = sorted({role for part in parts for role in part["other"]})
            found = f"captions of the role {', '.join(other)} alone" if other else "no sample at all"
            counted = " or ".join(sorted(_counted(data)))
            raise ShardError(f"{data.directory} has {found}; expected captions of the role {counted}")
        documents = any(part["documents"] for part in parts)
        return cls(data.source, images, dict(sorted(texts.items())), documents, own, data)

    def __len__(self) -> int:
        return len(self.images) if self.own is None or self.data is None else len(self.data)

    def image(self, number: int) -> bytes:
        """An encoded image; read anew if it is another rank's.

        Raises:
            ShardError: it cannot be read.
        """
        if self.own is None or self.data is None:
            return self.images[number]
        if number in self.own:
            return self.images[number - self.own.start]
        if (image := image_of(self.data.read(number))) is None:
            raise ShardError(f"{self.data.directory}: sample {self.data.row(number).key} has lost its image")
        return image

    def all_texts(self) -> list[str]:
        return sorted({text for entries in self.texts.values() for _, text in entries})


def _counted(data: Dataset) -> set[str]:
    """Roles of captions that are measured by."""
    return {"name", "query", *(["long"] if data.kind != "image-short" else [])}


def _read_part(data: Dataset, numbers: range, max_pixels: int) -> tuple[list[bytes], dict[str, Any]]:
    """(images, {captions: [number, language, text], documents, other: roles that do not count}) of some samples."""
    images: list[bytes] = []
    captions: list[tuple[int, str, str]] = []
    documents, counted, other = False, _counted(data), set()
    for number in numbers:
        members = data.read(number)
        image, of = image_of(members), texts_of(data, number, members).get("captions")
        if image is None or of is None:
            raise ShardError(
                f"{data.directory}: sample {data.row(number).key} has no image and captions to evaluate on; "
                f"it holds {', '.join(sorted(members))}"
            )
        check_image(image, max_pixels=max_pixels, name=f"{data.directory}, sample {data.row(number).key}")
        images.append(image)
        for caption in of:
            if (role := caption.get("role", "name")) in counted:
                documents |= role == "query"
                captions.append((number, caption["language"], caption["text"]))
            else:
                other.add(role)
    return images, {"captions": captions, "documents": documents, "other": sorted(other)}


@dataclass(frozen=True)
class EmbeddedPool:
    """A pool's embeddings: images `[N, D]`, distinct texts `[T, D]`, and the row of each text."""

    images: np.ndarray
    texts: np.ndarray
    row: dict[str, int] = field(repr=False)


def nothing() -> None:
    """What is done before each batch, unless something else is named."""


@torch.no_grad()
def embed(
    model: DualEncoder, pool: Pool, *, rank: int = 0, world: int = 1, before_batch: Callable[[], None] = nothing
) -> EmbeddedPool:
    """Embeds a pool; with `world` > 1 each rank embeds its part, and every rank gets all of it. The towers compute in
    the precision around this call, float32 if there is none.

    Args:
        before_batch: called before each batch, on every rank as often.
    """
    texts = pool.all_texts()
    parts = [part_of(len(pool), each, world) for each in range(world)]
    mine = pool.images if pool.own is not None else pool.images[parts[rank].start : parts[rank].stop]
    return EmbeddedPool(
        _embed(model.vision.encode, mine, [len(part) for part in parts], before_batch),
        embed_texts(model, texts, rank=rank, world=world, before_batch=before_batch),
        row={text: i for i, text in enumerate(texts)},
    )


@torch.no_grad()
def embed_texts(
    model: DualEncoder,
    texts: Sequence[str],
    *,
    rank: int = 0,
    world: int = 1,
    before_batch: Callable[[], None] = nothing,
) -> np.ndarray:
    """`[N, D]`, not normalised; arguments as `embed`."""
    order = sorted(range(len(texts)), key=lambda number: (-len(texts[number]), number))  # batches of like lengths
    dealt = [order[each::world] for each in range(world)]  # in turn, so that all ranks have long ones
    encode = partial(model.text.encode, max_length=MAX_TOKENS)
    rows = _embed(encode, [texts[n] for n in dealt[rank]], [len(part) for part in dealt], before_batch)
    whole = np.empty_like(rows)
    whole[[number for part in dealt for number in part]] = rows
    return whole


def _embed(
    encode: Callable[..., np.ndarray], mine: Sequence[Any], sizes: Sequence[int], before_batch: Callable[[], None]
) -> np.ndarray:
    """The rows of what all ranks have, rank after rank.

    Args:
        mine: what this rank has.
        sizes: how much each rank has.
    """
    rows = []
    for first in range(0, max(1, *sizes), BATCH):
        before_batch()
        rows.append(encode(mine[first : first + BATCH], normalize=False, batch_size=BATCH))
    return rows_together(np.concatenate(rows), sizes)


def cut_texts(model: DualEncoder, texts: Sequence[str]) -> tuple[int, int]:
    """(how many texts `embed_texts` truncates, to how many tokens)."""
    longest = min(MAX_TOKENS, model.text.config.max_length)
    return sum(len(ids) > longest for ids in model.text.tokenizer(texts)) if model.text.tokenizer else 0, longest


def score(pool: Pool, embedded: EmbeddedPool, dims: Sequence[int], index: Index = exact) -> tuple[Scores, Scores]:
    """(recall@5, level of a random guess), as direction → dim or "chance" → language → value.

    Every caption is a query, and any caption of an image is relevant to it. A text that several images share counts
    once: each of them is relevant to it, and it is relevant to each.

    Args:
        index: how candidates are stored.
    """
    recalls: Scores = {direction: {} for direction in DIRECTIONS}
    chances: Scores = {direction: {} for direction in DIRECTIONS}
    english = pool.texts.get("en", [])
    for dim in dims:
        images = unit(embedded.images[:, :dim])
        texts = unit(embedded.texts[:, :dim])
        for language, entries in pool.texts.items():
            names, has = _texts_and_images(entries, len(images))
            vectors = texts[[embedded.row[t] for t in names]]
            shown = has.any(axis=0)
            cases = {
                "text→image": (vectors, images, has),
                "image→text": (images[shown], vectors, has.T[shown]),
            }
            if language != "en" and english:
                targets, named = _texts_and_images(english, len(images))
                right = (has.astype(np.float32) @ named.T.astype(np.float32)) > 0
                asked = right.any(axis=1)
                cases["text→English text"] = (vectors[asked], texts[[embedded.row[t] for t in targets]], right[asked])
            for direction, (queries, candidates, relevant) in cases.items():
                recalls[direction].setdefault(str(dim), {})[language] = recall_at_k(
                    queries, candidates, relevant, K, index
                )
                chances[direction].setdefault("chance", {})[language] = chance_at_k(relevant)
    for table in [*recalls.values(), *chances.values()]:
        for by_language in table.values():
            by_language["mean"] = float(np.mean(list(by_language.values())))
    return recalls, chances


def ndcg(pool: Pool, embedded: EmbeddedPool, dims: Sequence[int], k: int = K, index: Index = exact) -> Scores:
    """nDCG@5 of retrieving the pages that answer each query, ViDoRe's metric (arXiv 2407.01449).

    Args:
        index: how pages are stored.
    """
    found: Scores = {"text→image": {}}
    for dim in dims:
        scores_of, texts = index(unit(embedded.images[:, :dim])), unit(embedded.texts[:, :dim])
        by_language = found["text→image"].setdefault(str(dim), {})
        for language, entries in pool.texts.items():
            queries, has = _texts_and_images(entries, len(embedded.images))
            scores = scores_of(texts[[embedded.row[q] for q in queries]])
            gains = [ndcg_at_k(own, set(np.flatnonzero(of)), k) for own, of in zip(scores, has, strict=True)]
            by_language[language] = float(np.mean(gains))
        by_language["mean"] = float(np.mean(list(by_language.values())))
    return found


def _texts_and_images(entries: list[tuple[int, str]], images: int) -> tuple[list[str], np.ndarray]:
    """(distinct texts, which images each belongs to as bool `[texts, images]`) of a pool's entries."""
    names = sorted({text for _, text in entries})
    row = {text: i for i, text in enumerate(names)}
    has = np.zeros((len(names), images), dtype=bool)
    for number, text in entries:
        has[row[text], number] = True
    return names, has
