"""Captioned photos as LAION's CLIP_benchmark measures them, on which the paper's tables 2, 5, 7 to 9, 12 to 14 rest.

Every caption is a query and a candidate of its own, right for its own image alone: an equal caption of another image
is a miss. Text→image: the share of captions whose image is among the five nearest. Image→text: the share of images with
any of their captions among the five nearest of all captions of the language; an image without one is a miss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stage_trainer.errors import UserError
from stage_trainer.evaluation.measured import Figures, Measured, compared, compared_by_language
from stage_trainer.evaluation.models import Embedder
from stage_trainer.evaluation.retrieval import EmbeddedPool, Pool
from stage_trainer.evaluation.sets import EvalSet
from stage_trainer.metrics.ranking import best, hits
from stage_trainer.metrics.retrieval import unit
from stage_trainer.recipe.limits import MAX_PIXELS

K = 5
TEXT_TO_IMAGE, IMAGE_TO_TEXT = "recall@5 text→image", "recall@5 image→text"
FIRST_CAPTION_ALONE = "Crossmodal-3600"

Entries = list[tuple[int, str]]
"""(image, caption) of each caption of a language."""


def measure(model: Embedder, known: EvalSet, folder: Path, max_pixels: int = MAX_PIXELS) -> Measured:
    """Recall@5 in both directions, for each of the set's languages and every dim.

    Raises:
        UserError: the set or an image cannot be read, it has none of its languages, or the model's embeddings cannot be
            ranked by.
    """
    pool = Pool.open(folder, max_pixels)
    entries = entries_of(known, pool)
    if not entries:
        has, asked = ", ".join(pool.texts), ", ".join(known.languages)
        raise UserError(f"{folder} has captions in {has}; {known.name} is measured in {asked}")
    texts = sorted({text for of in entries.values() for _, text in of})
    row = {text: number for number, text in enumerate(texts)}
    embedded = EmbeddedPool(model.embed_images(pool.images), model.embed_texts(texts), row)
    notes = compared(known, {"images": len(pool.images)})
    notes += compared_by_language(known, "texts", {language: len(of) for language, of in entries.items()})
    whole = not notes
    if missing := [language for language in known.languages if language not in entries]:
        notes.append(f"{known.name} has no captions in {', '.join(missing)} in {folder}")
    counts = {"images": len(pool.images), "texts": sum(map(len, entries.values())), "languages": len(entries)}
    return Measured(figures_of(entries, embedded, model.dims), counts, tuple(notes), whole)


def entries_of(known: EvalSet, pool: Pool) -> dict[str, Entries]:
    """The captions that the set's protocol asks by, in those of its languages that the pool has."""
    entries = {language: of for language in known.languages if (of := pool.texts.get(language))}
    if known.name == FIRST_CAPTION_ALONE:
        return {language: first_captions(of) for language, of in entries.items()}
    return entries


def figures_of(entries: Mapping[str, Entries], embedded: EmbeddedPool, dims: Sequence[int]) -> Figures:
    """Recall@5 in both directions, by language and dim."""
    figures: Figures = {TEXT_TO_IMAGE: {}, IMAGE_TO_TEXT: {}}
    for language, of in entries.items():
        rows = embedded.texts[[embedded.row[text] for _, text in of]]
        for dim in dims:
            values = recall(embedded.images[:, :dim], rows[:, :dim], [image for image, _ in of])
            for measure, value in zip(figures, values, strict=True):
                figures[measure].setdefault(language, {})[str(dim)] = value
    return figures


def first_captions(entries: Entries) -> Entries:
    """The first caption of each image."""
    first: dict[int, str] = {}
    for image, text in entries:
        first.setdefault(image, text)
    return list(first.items())


def recall(images: np.ndarray, captions: np.ndarray, image_of: Sequence[int], k: int = K) -> tuple[float, float]:
    """(text→image, image→text) recall@k, as hits.

    Args:
        images: float32 `[N, D]`; captions: float32 `[T, D]`; of any length.
        image_of: the number of each caption's image.
    """
    images, captions = unit(images), unit(captions)
    own: list[set[int]] = [set() for _ in images]
    for caption, image in enumerate(image_of):
        own[image].add(caption)
    there = hits(best(captions, images, k), [{image} for image in image_of])
    return there, hits(best(images, captions, k), own)
