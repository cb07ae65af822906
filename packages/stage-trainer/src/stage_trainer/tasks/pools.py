"""Validation of embeddings while a stage trains: recall, nDCG, correlation and the gap between modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_prep.shards import ShardError

from stage_trainer.data.config import DataConfig
from stage_trainer.data.opening import open_data_set
from stage_trainer.data.remote_data import place
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine import Engine
from stage_trainer.evaluation import cross_modal, picture, retrieval, text_retrieval
from stage_trainer.evaluation.measures import (
    by_published_protocol,
    name_beside,
    of_images,
    of_pairs,
    title_of,
    title_of_pairs,
)
from stage_trainer.evaluation.sets import captions_of
from stage_trainer.metrics.measure import Measure
from stage_trainer.metrics.modality_gap import modality_gap
from stage_trainer.metrics.retrieval import unit
from stage_trainer.tasks.task import Measured


class PoolValidation:
    """Every pool by its kind: recall@5 and the gap between modalities of captioned images, nDCG@5 of pages that answer
    queries, nDCG@10 of text pairs; of a published set of photos also recall@5 as in published figures.

    Args:
        data: where they are.
        paths: of the pools. Of images each rank reads and embeds its part alone.

    Attributes:
        measures: by name in TensorBoard.

    Raises:
        UserError: held-out data that are missing or damaged.
    """

    def __init__(self, data: DataConfig, paths: Sequence[str], engine: Engine):
        self.engine, self.fonts = engine, Path(data.corpus)
        self.images: dict[str, retrieval.Pool] = {}
        self.pairs: dict[str, text_retrieval.PairPool] = {}
        for path in paths:
            directory = place(data, "validation", path)
            found = open_data_set(directory, ("image-", "text-"))
            if found.kind.startswith("image-"):
                name = name_beside(self.images, found.source, found.kind, path)
                self.images[name] = retrieval.Pool.open(directory, data.max_pixels, engine.forward_share())
            else:
                name = name_beside(self.pairs, found.source, found.kind, path)
                self.pairs[name] = text_retrieval.PairPool.open(directory)
        model = engine.objective.model
        self.dims = model.matryoshka_dims or (model.text.config.output_width,)
        self.measures: dict[str, Measure] = {}
        for name, pool in self.images.items():
            width = model.text.config.output_width
            self.measures |= of_images(name, pool.texts, self.dims, width, documents=pool.documents, source=pool.name)
        for name, pair_pool in self.pairs.items():
            self.measures |= of_pairs(name, pair_pool.queries, scored=bool(pair_pool.scores))

    def run(self, last: bool, before_batch: Callable[[], None]) -> Measured:
        """Measures every pool, in the run's precision; the results are on rank 0, after the `last` step with vectors
        for the projector."""
        objective = self.engine.objective
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=objective.precision == "bf16"):
            return self._measure(objective.model, last, before_batch)

    def _measure(self, model: DualEncoder, last: bool, before_batch: Callable[[], None]) -> Measured:
        model.eval()
        share, shares = self.engine.forward_share()
        part: dict[str, Any] = {"rank": share, "world": shares, "before_batch": before_batch}
        main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        values: dict[str, float] = {}
        embedded = [retrieval.embed(model, pool, **part) for pool in self.images.values()]
        for (name, pool), vectors in zip(self.images.items(), embedded, strict=True):
            if main:
                values |= _recall(name, pool, vectors, self.dims)
        for pair_name, pair_pool in self.pairs.items():
            texts = pair_pool.texts()
            of_texts = retrieval.embed_texts(model, texts, **part)
            if main:
                found = text_retrieval.measure(pair_pool, text_retrieval.lookup(texts, of_texts))
                values |= {title_of_pairs(pair_name, what): value for what, value in found.items()}
        headlines = [name for name in values if self.measures[name].headline]
        shown = [f"{name.removeprefix('validation_')} {values[name]:.3f}" for name in headlines]
        if not (main and self.images):
            return Measured(values, shown)
        fonts, pools = picture.fonts_of(self.fonts), list(self.images.values())
        try:
            drawn = picture.draw(picture.own_rows(pools, embedded, fonts), fonts)
        except ShardError as error:  # an image of another rank's part, which is read for the picture alone
            drawn = None
            shown.append(f"no picture of a search: {error}")
        return Measured(values, shown, drawn, *(_snapshot(pools[0], embedded[0]) if last else ()))


def _recall(name: str, pool: retrieval.Pool, embedded: retrieval.EmbeddedPool, dims: Sequence[int]) -> dict[str, float]:
    """Recall@5 (of pages nDCG@5, too) by direction, mean over languages at the full width, and by language and dim; the
    modality gap."""
    dims = sorted({*dims, embedded.images.shape[1]}, reverse=True)
    measures = {"recall": retrieval.score(pool, embedded, dims)[0]}
    if pool.documents:
        measures["ndcg"] = retrieval.ndcg(pool, embedded, dims)
    values = {}
    for measure, by_direction in measures.items():
        for direction, by_dim in by_direction.items():
            title = title_of(measure, name, direction)
            for number, (dim, by_language) in enumerate(by_dim.items()):
                if number == 0:
                    values[title] = by_language["mean"]
                    values |= {f"{title}/{language}": v for language, v in by_language.items() if language != "mean"}
                else:
                    values[f"{title}/{dim} dims"] = by_language["mean"]
    if known := captions_of(pool.name, pool.texts):
        width = embedded.images.shape[1]
        figures = cross_modal.figures_of(cross_modal.entries_of(known, pool), embedded, [width])
        for measure, rows in figures.items():
            mean = float(np.mean([by_dim[str(width)] for by_dim in rows.values()]))
            values[title_of("recall", by_published_protocol(name), measure.rpartition("@5 ")[2])] = mean
    values[f"modality_gap/{name}"] = modality_gap(embedded.images, embedded.texts)
    return values


def _snapshot(pool: retrieval.Pool, embedded: retrieval.EmbeddedPool) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """A pool's images, each with a caption in English (or the first language): unit vectors `[N, D]` and labels."""
    entries = list(dict(pool.texts.get("en") or next(iter(pool.texts.values()))).items())
    images = [embedded.images[number] for number, _ in entries]
    texts = [embedded.texts[embedded.row[text]] for _, text in entries]
    labels = [(text, kind) for kind in ("image", "text") for _, text in entries]
    return torch.from_numpy(unit(np.stack([*images, *texts]))), labels
