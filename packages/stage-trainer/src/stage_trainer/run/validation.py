"""What a run measures on held-out data while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_tower import Tokenizer

from stage_trainer.data.batches import open_data_set
from stage_trainer.data.masked import held_out
from stage_trainer.data.remote_data import place
from stage_trainer.engine import Engine
from stage_trainer.evaluation import picture, retrieval, text_retrieval
from stage_trainer.evaluation.tables import joined
from stage_trainer.masked_lm import held_out_losses
from stage_trainer.metrics.measure import Measure
from stage_trainer.metrics.modality_gap import modality_gap
from stage_trainer.metrics.retrieval import unit
from stage_trainer.recipe import Recipe, Stage
from stage_trainer.run.monitor import Monitor
from stage_trainer.run.rank_0 import from_rank_0


@dataclass(frozen=True)
class Validation:
    """What a stage measures: `measures` by name in TensorBoard, known before the first step.

    To call it measures, shows and returns what it found, by the same names, given (monitor, steps done, rank, world).
    Every rank has to call, and every rank gets the same.
    """

    measures: dict[str, Measure]
    run: Callable[[Monitor, int, int, int], dict[str, float]]

    def __call__(self, monitor: Monitor, step: int, rank: int, world: int) -> dict[str, float]:
        return self.run(monitor, step, rank, world)


def validation(recipe: Recipe, stage: Stage, engine: Engine, tokenizer: Tokenizer) -> Validation | None:
    """What the stage measures, or None if it measures nothing.

    Raises:
        UserError: held-out data that is missing or damaged.
    """
    if not recipe.evaluation.every:
        return None
    return _masked_lm(recipe, stage, engine, tokenizer) if stage.masked else _embeddings(recipe, stage, engine)


def _embeddings(recipe: Recipe, stage: Stage, engine: Engine) -> Validation:
    """Every pool by its kind: recall@5 and the gap between modalities of captioned images, nDCG@5 of pages that answer
    queries, nDCG@10 of text pairs."""
    images: dict[str, retrieval.Pool] = {}
    pairs: dict[str, text_retrieval.PairPool] = {}
    for path in recipe.evaluation.pools:
        directory = place(recipe, "validation", path)
        data = open_data_set(directory, ("image-", "text-"))
        of_kind: dict[str, Any] = images if data.kind.startswith("image-") else pairs
        names = (data.source, f"{data.source}-{data.kind}", path)
        name = next(name for name in names if name not in of_kind)
        open_pool = retrieval.Pool.open if of_kind is images else text_retrieval.PairPool.open
        of_kind[name] = open_pool(directory)
    model = engine.objective.model
    dims = model.matryoshka_dims or (model.text.config.width,)
    measures: dict[str, Measure] = {}
    for name, pool in images.items():
        measures |= of_images(name, pool, dims, model.text.config.width)
    for name, pair_pool in pairs.items():
        measures |= of_pairs(name, pair_pool)

    def validate(monitor: Monitor, step: int, rank: int, world: int) -> dict[str, float]:
        model.eval()
        share = (rank, world) if engine.zero < 3 else (0, 1)  # under ZeRO 3 all ranks must run the same forward passes
        values: dict[str, float] = {}
        embedded = [retrieval.embed(model, pool, rank=share[0], world=share[1]) for pool in images.values()]
        for (name, pool), vectors in zip(images.items(), embedded, strict=True):
            if rank == 0:
                values |= _recall(name, pool, vectors, dims)
        for pair_name, pair_pool in pairs.items():
            texts = pair_pool.texts()
            of_texts = retrieval.embed_texts(model, texts, rank=share[0], world=share[1])
            if rank == 0:
                found = text_retrieval.measure(pair_pool, text_retrieval.lookup(texts, of_texts))
                values |= {_pair_title(pair_name, what): value for what, value in found.items()}
        values = from_rank_0(values)
        for name, value in values.items():
            monitor.scalar(name, value, step - 1)
        if values:
            shown = [name for name in values if measures[name].headline]
            parts = [f"{name.removeprefix('validation_')} {values[name]:.3f}" for name in shown]
            monitor.say(joined(f"step {step}:", parts))
        if rank == 0 and images:
            fonts, pools = picture.fonts_of(Path(recipe.corpus)), list(images.values())
            monitor.image("nearest images", picture.draw(picture.own_rows(pools, embedded, fonts), fonts), step - 1)
            if step == stage.steps:
                _snapshot(pools[0], embedded[0], monitor, step - 1)
        return values

    return Validation(measures, validate)


def of_images(name: str, pool: retrieval.Pool, dims: Sequence[int], width: int) -> dict[str, Measure]:
    """What `_recall` measures of a pool of captioned images."""
    languages: dict[str, list[str]] = {d: list(pool.texts) for d in ("text→image", "image→text")}
    if "en" in pool.texts and (others := [language for language in pool.texts if language != "en"]):
        languages["text→English text"] = others
    kinds = [("recall", languages)]
    if pool.documents:
        kinds.append(("ndcg", {"text→image": list(pool.texts)}))
    found: dict[str, Measure] = {}
    for measure, by_direction in kinds:
        for direction, of in by_direction.items():
            title = _title(measure, name, direction)
            found[title] = Measure(headline=True)
            found |= {f"{title}/{language}": Measure() for language in of}
            found |= {f"{title}/{dim} dims": Measure() for dim in dims if dim != width}
    return {**found, f"modality_gap/{name}": Measure(higher_is_better=False)}


def of_pairs(name: str, pool: text_retrieval.PairPool) -> dict[str, Measure]:
    """What is measured of a pool of text pairs."""
    found = {_pair_title(name, f"ndcg_at_10/{language}"): Measure() for language in pool.queries}
    if pool.queries:
        found[_pair_title(name, "ndcg_at_10/mean")] = Measure(headline=True)
    if pool.scores:
        found[_pair_title(name, "spearman")] = Measure(headline=True)
    return found


def _title(measure: str, pool: str, direction: str) -> str:
    return f"validation_{measure}_at_5_{pool}/{direction.replace('→', ' to ')}"


def _pair_title(pool: str, what: str) -> str:
    measure, _, language = what.partition("/")
    return f"validation_{measure}_{pool}/{language or 'all'}"


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
            title = _title(measure, name, direction)
            for number, (dim, by_language) in enumerate(by_dim.items()):
                if number == 0:
                    values[title] = by_language["mean"]
                    values |= {f"{title}/{language}": v for language, v in by_language.items() if language != "mean"}
                else:
                    values[f"{title}/{dim} dims"] = by_language["mean"]
    values[f"modality_gap/{name}"] = modality_gap(embedded.images, embedded.texts)
    return values


def _snapshot(pool: retrieval.Pool, embedded: retrieval.EmbeddedPool, monitor: Monitor, step: int) -> None:
    """A pool for TensorBoard's projector: its images, each with a caption in English (or the first language)."""
    entries = list(dict(pool.texts.get("en") or next(iter(pool.texts.values()))).items())
    images = [embedded.images[number] for number, _ in entries]
    texts = [embedded.texts[embedded.row[text]] for _, text in entries]
    labels = [(text, kind) for kind in ("image", "text") for _, text in entries]
    monitor.embeddings(torch.from_numpy(unit(np.stack([*images, *texts]))), labels, step)


def _masked_lm(recipe: Recipe, stage: Stage, engine: Engine, tokenizer: Tokenizer) -> Validation | None:
    """The loss on hidden words of the validation split, by language and over all; None if there is no such data."""
    if not (batches := held_out(recipe, stage, tokenizer)):
        return None
    tokens = stage.chunks.tokens if stage.chunks else 0
    over_all = "validation_loss_masked_lm/all"
    measures = {f"validation_loss_masked_lm/{name}": Measure(higher_is_better=False) for name in batches}
    measures[over_all] = Measure(higher_is_better=False, headline=True)

    def validate(monitor: Monitor, step: int, rank: int, world: int) -> dict[str, float]:
        engine.engine.eval()
        share = (rank, world) if engine.zero < 3 else (0, 1)  # as above
        losses = held_out_losses(engine, batches, rank=share[0], world=share[1], tokens=tokens)
        values = from_rank_0({f"validation_loss_masked_lm/{name}": loss for name, loss in losses.items()})
        for name, value in values.items():
            monitor.scalar(name, value, step - 1)
        monitor.say(f"step {step}: {values[over_all]:.3f} nats a hidden token of held-out texts")
        return values

    return Validation(measures, validate)
