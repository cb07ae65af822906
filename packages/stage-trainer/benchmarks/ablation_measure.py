"""What the ablations measure of a model: a value for each held-out item, for paired tests between models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stage_trainer.checkpoint.load import all_saved
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.retrieval import Pool, embed, embed_texts
from stage_trainer.evaluation.text_retrieval import PairPool
from stage_trainer.metrics.modality_gap import modality_gap
from stage_trainer.metrics.retrieval import ndcg_at_k, unit

IMAGES = ("emoji", "stamps", "drawn")
TEXTS = ("emoji", "stamps", "drawn", "packages")


@dataclass(frozen=True)
class Measured:
    """`items` is {metric at dim: a value for each item}, `scalars` {name: value}, `curves` {tag: [(step, value), …]}.

    `mark` is a hash of the settings that it was measured under.
    """

    mark: str
    items: dict[str, np.ndarray]
    scalars: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]

    def save(self, path: Path) -> None:
        rest = json.dumps({"mark": self.mark, "scalars": self.scalars, "curves": self.curves})
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.savez(file, __rest__=np.array(rest), **self.items)  # type: ignore[arg-type]
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Measured:
        with np.load(path) as content:
            rest = json.loads(str(content["__rest__"]))
            items = {name: content[name] for name in content.files if name != "__rest__"}
        return cls(rest["mark"], items, rest["scalars"], rest["curves"])


def measure(stage: Path, corpus: Path, documents: bool, mark: str) -> Measured:
    """Measures the last checkpoint of a stage on the test split: emoji and stamps, or pages."""
    model = DualEncoder.from_pretrained(all_saved(stage)[-1].path / "model")
    dims = sorted({*(model.matryoshka_dims or ()), model.text.config.output_width}, reverse=True)
    items: dict[str, np.ndarray] = {}
    scalars: dict[str, float] = {}
    test = corpus / "test"
    if documents:
        for name in ("figures", "titles"):
            pool = Pool.open(test / f"image-short/pages-{name}")
            items |= {f"nDCG@5 of pages by {name}, {d}": v for d, v in of_pool(model, pool, dims[:1], {})[0].items()}
        return Measured(mark, items, scalars, curves(stage))
    for name in IMAGES:
        if (path := test / "image-short" / name).exists():
            to_images, to_texts = of_pool(model, Pool.open(path), dims, scalars)
            items |= {f"{name} text→image, {dim}": values for dim, values in to_images.items()}
            items |= {f"{name} image→text, {dim}": values for dim, values in to_texts.items()}
    for name in TEXTS:
        if (path := test / "text-pairs" / name).exists():
            items |= {f"{name} text→text, {d}": v for d, v in of_pairs(model, PairPool.open(path), dims).items()}
    return Measured(mark, items, scalars, curves(stage))


def of_pool(
    model: DualEncoder, pool: Pool, dims: Iterable[int], scalars: dict[str, float]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Per image `[N]`, each the mean over the image's languages or queries: (of its texts that find it among the first
    five, or nDCG@5 of pages; whether one of its texts is among its first five in a language)."""
    embedded = embed(model, pool)
    to_images: dict[int, np.ndarray] = {}
    to_texts: dict[int, np.ndarray] = {}
    for dim in dims:
        images, texts = unit(embedded.images[:, :dim]), unit(embedded.texts[:, :dim])
        found: list[list[float]] = [[] for _ in pool.images]
        finds: list[list[float]] = [[] for _ in pool.images]
        for entries in pool.texts.values():
            relevant: dict[str, set[int]] = {}
            for number, text in entries:
                relevant.setdefault(text, set()).add(number)
            scores = texts[[embedded.row[text] for text in relevant]] @ images.T
            for own, of_text in zip(relevant.values(), scores, strict=True):
                value = ndcg_at_k(of_text, own, 5) if pool.documents else float(bool(own & top(of_text)))
                for number in own:
                    found[number].append(value)
            words = list(relevant)
            for number in {number for number, _ in entries}:
                finds[number].append(any(number in relevant[words[place]] for place in top(scores[:, number])))
        # An item without a text in any language is none.
        to_images[dim] = np.array([np.mean(values) for values in found if values])
        to_texts[dim] = np.array([np.mean(values) for values in finds if values])
    scalars[f"modality gap, {pool.name}"] = float(modality_gap(unit(embedded.images), unit(embedded.texts)))
    return to_images, to_texts


def top(scores: np.ndarray, k: int = 5) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:k].tolist())


def of_pairs(model: DualEncoder, pool: PairPool, dims: Iterable[int]) -> dict[int, np.ndarray]:
    """Per target `[N]`: the mean nDCG@10 of the queries, in any language, that it answers."""
    texts = pool.texts()
    vectors, row = embed_texts(model, texts), {text: i for i, text in enumerate(texts)}
    place = {text: i for i, text in enumerate(pool.targets)}
    result = {}
    for dim in dims:
        units = unit(vectors[:, :dim])
        targets = units[[row[text] for text in pool.targets]]
        gains: list[list[float]] = [[] for _ in pool.targets]
        for entries in pool.queries.values():
            relevant: dict[str, set[int]] = {}
            for number, text in entries:
                relevant.setdefault(text, set()).add(number)
            for text, scores in zip(relevant, units[[row[text] for text in relevant]] @ targets.T, strict=True):
                if text in place and place[text] not in relevant[text]:
                    scores[place[text]] = -np.inf  # a query does not retrieve itself
                for number in relevant[text]:
                    gains[number].append(ndcg_at_k(scores, relevant[text]))
        result[dim] = np.array([np.mean(values) for values in gains if values])
    return result


def curves(stage: Path) -> dict[str, list[tuple[int, float]]]:
    """The temperatures of a stage, as TensorBoard has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for events in sorted(stage.glob("events.out.tfevents.*")):
        read = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        for tag in read.Tags()["scalars"]:
            if "temperature" in tag:
                found.setdefault(tag, {}).update({event.step: event.value for event in read.Scalars(tag)})
    return {tag: sorted(values.items()) for tag, values in found.items()}
