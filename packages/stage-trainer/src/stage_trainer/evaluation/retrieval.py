"""Recall of one thing from another on a pool of captioned images, and nDCG on one of pages that answer queries, for
every language and Matryoshka dim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_prep.shards import Dataset, ShardError

from stage_trainer.data.remote_data import RemotePlace, open_place
from stage_trainer.data.samples import image_of, texts_of
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.evaluation.text_retrieval import ndcg_at_k

K = 5
MAX_TOKENS = 512  # of a text, where the tower takes more: the default of jina-clip-v2 as published
_QUERIES = 1024  # compared at a time: 25,000 captions with as many images would be gigabytes
DIRECTIONS = ("text→image", "image→text", "text→English text")

Scores = dict[str, dict[str, dict[str, float]]]
"""direction → dim → language (and "mean") → recall@5 (or nDCG@5), between 0 and 1."""


@dataclass(frozen=True)
class Pool:
    """Held-out images and the captions of each: `texts[language]` is [(image number, text), …], by image.

    `documents`: the images are pages, and the texts queries that they answer.
    """

    name: str
    images: list[bytes]
    texts: dict[str, list[tuple[int, str]]]
    documents: bool = False

    @classmethod
    def open(cls, directory: str | Path | RemotePlace) -> Pool:
        """Reads a data set of images with captions; those of the role "name" or "query", or of none, all count, of a
        data set of long captions also those of the role "long".

        Raises:
            UserError: a data set that is missing, damaged or without such captions, a sample without an image or
                without captions.
        """
        try:
            return cls._read(open_place(directory))
        except (ShardError, FileNotFoundError) as error:
            raise UserError(str(error)) from error

    @classmethod
    def _read(cls, data: Dataset) -> Pool:
        images: list[bytes] = []
        texts: dict[str, list[tuple[int, str]]] = {}
        documents = False
        counted = {"name", "query", *(["long"] if data.kind == "image-long" else [])}
        other: set[str] = set()
        for number in range(len(data)):
            members = data.read(number)
            image, captions = image_of(members), texts_of(data, number, members).get("captions")
            if image is None or captions is None:
                raise ShardError(
                    f"{data.directory}: sample {data.row(number).key} has no image and captions to evaluate on; "
                    f"it holds {', '.join(sorted(members))}"
                )
            images.append(image)
            for caption in captions:
                if (role := caption.get("role", "name")) in counted:
                    documents |= role == "query"
                    texts.setdefault(caption["language"], []).append((number, caption["text"]))
                else:
                    other.add(role)
        if not texts:
            found = f"captions of the role {', '.join(sorted(other))} alone" if other else "no sample at all"
            raise ShardError(
                f"{data.directory} has {found}; expected captions of the role {' or '.join(sorted(counted))}"
            )
        return cls(data.source, images, dict(sorted(texts.items())), documents)

    def all_texts(self) -> list[str]:
        return sorted({text for entries in self.texts.values() for _, text in entries})


@dataclass(frozen=True)
class Embedded:
    """A pool's embeddings: images `[N, D]`, and each distinct text's `[D]` by its text."""

    images: np.ndarray
    texts: np.ndarray
    row: dict[str, int] = field(repr=False)


@torch.no_grad()
def embed(model: DualEncoder, pool: Pool, *, rank: int = 0, world: int = 1) -> Embedded:
    """Embeds a pool; with `world` > 1 each rank a part, and every rank gets the whole."""
    texts = pool.all_texts()
    images = model.encode_image(pool.images[rank::world], normalize=False, batch_size=256)
    return Embedded(
        _of_all_ranks(images, rank, world),
        embed_texts(model, texts, rank=rank, world=world),
        row={text: i for i, text in enumerate(texts)},
    )


@torch.no_grad()
def embed_texts(model: DualEncoder, texts: Sequence[str], *, rank: int = 0, world: int = 1) -> np.ndarray:
    """`[N, D]`, not normalised; with `world` > 1 each rank embeds a part, and every rank gets the whole."""
    part = model.encode_text(texts[rank::world], max_length=MAX_TOKENS, normalize=False, batch_size=256)
    return _of_all_ranks(part, rank, world)


def cut_texts(model: DualEncoder, texts: Sequence[str]) -> tuple[int, int]:
    """(how many texts are longer than what `embed_texts` takes of a text, that in tokens)."""
    longest = min(MAX_TOKENS, model.text.config.max_length)
    return sum(len(ids) > longest for ids in model.text.tokenizer(texts)) if model.text.tokenizer else 0, longest


def _of_all_ranks(part: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Rows that were dealt out to the ranks in turns, in their order."""
    if world == 1:
        return part
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, part)
    whole = np.empty((sum(map(len, gathered)), part.shape[1]), np.float32)
    for r, rows in enumerate(gathered):
        whole[r::world] = rows
    return whole


def score(pool: Pool, embedded: Embedded, dims: Sequence[int]) -> tuple[Scores, Scores]:
    """Recall@5 of the pool, and the level of a blind guess, both as direction → dim or "chance" → language.

    Every caption is a query, and any caption of an image is right for it. Texts that several images share count once:
    any of those images is right for it, and it is right for each.
    """
    recalls: Scores = {direction: {} for direction in DIRECTIONS}
    chances: Scores = {direction: {} for direction in DIRECTIONS}
    english = pool.texts.get("en", [])
    for dim in dims:
        images = unit(embedded.images[:, :dim])
        texts = unit(embedded.texts[:, :dim])
        for language, entries in pool.texts.items():
            names, has = _who_has_what(entries, len(images))
            vectors = texts[[embedded.row[t] for t in names]]
            shown = has.any(axis=0)
            cases = {
                "text→image": (vectors, images, has),
                "image→text": (images[shown], vectors, has.T[shown]),
            }
            if language != "en" and english:
                targets, named = _who_has_what(english, len(images))
                right = (has.astype(np.float32) @ named.T.astype(np.float32)) > 0
                asked = right.any(axis=1)
                cases["text→English text"] = (vectors[asked], texts[[embedded.row[t] for t in targets]], right[asked])
            for direction, (queries, candidates, relevant) in cases.items():
                recalls[direction].setdefault(str(dim), {})[language] = recall_at_k(queries, candidates, relevant)
                chances[direction].setdefault("chance", {})[language] = chance_at_k(relevant)
    for table in [*recalls.values(), *chances.values()]:
        for by_language in table.values():
            by_language["mean"] = float(np.mean(list(by_language.values())))
    return recalls, chances


def ndcg(pool: Pool, embedded: Embedded, dims: Sequence[int], k: int = K) -> Scores:
    """nDCG@5 of finding the pages that answer each query, ViDoRe's measure (arXiv 2407.01449)."""
    found: Scores = {"text→image": {}}
    for dim in dims:
        pages, texts = unit(embedded.images[:, :dim]), unit(embedded.texts[:, :dim])
        by_language = found["text→image"].setdefault(str(dim), {})
        for language, entries in pool.texts.items():
            queries, has = _who_has_what(entries, len(pages))
            scores = texts[[embedded.row[q] for q in queries]] @ pages.T
            gains = [ndcg_at_k(own, set(np.flatnonzero(of)), k) for own, of in zip(scores, has, strict=True)]
            by_language[language] = float(np.mean(gains))
        by_language["mean"] = float(np.mean(list(by_language.values())))
    return found


def _who_has_what(entries: list[tuple[int, str]], images: int) -> tuple[list[str], np.ndarray]:
    """The distinct texts T of some entries, and which of the images each belongs to, bool `[T, images]`."""
    names = sorted({text for _, text in entries})
    row = {text: i for i, text in enumerate(names)}
    has = np.zeros((len(names), images), dtype=bool)
    for number, text in entries:
        has[row[text], number] = True
    return names, has


def recall_at_k(queries: np.ndarray, candidates: np.ndarray, relevant: np.ndarray, k: int = K) -> float:
    """The share of queries `[Q, D]` with something relevant (`[Q, C]`) among the k nearest candidates `[C, D]`."""
    k = min(k, len(candidates))
    hits = 0
    for first in range(0, len(queries), _QUERIES):
        part = slice(first, first + _QUERIES)
        nearest = np.argpartition(-(queries[part] @ candidates.T), k - 1, axis=1)[:, :k]
        hits += int(np.take_along_axis(relevant[part], nearest, axis=1).any(axis=1).sum())
    return hits / len(queries)


def chance_at_k(relevant: np.ndarray, k: int = K) -> float:
    """What a blind guess of k candidates would reach."""
    total = relevant.shape[1]
    return float(
        np.mean([1 - comb(total - int(r), k) / comb(total, k) if total >= k else 1.0 for r in relevant.sum(axis=1)])
    )


def unit(x: np.ndarray) -> np.ndarray:
    """Rows `[N, D]` at length one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
