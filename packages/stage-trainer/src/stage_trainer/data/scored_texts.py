"""Triplets with the scores of a cross-encoder, from the disk or in the data themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from data_prep.shards import Dataset, ShardError, Unusable

from stage_trainer.data.hard_negatives import negatives_of
from stage_trainer.data.samples import SampleCache
from stage_trainer.data.taught_texts import TaughtTexts, first_in
from stage_trainer.errors import UserError
from stage_trainer.recipe.teacher import TeacherConfig


class ScoredTexts(TaughtTexts):
    """A stage's data sets of triplets; a sample has the teacher's scores, of the query with the target and with each of
    the K hard negatives, float32 `[1 + K]`, as `teacher` among its texts."""

    def __init__(self, teacher: TeacherConfig, sources: Iterable[Dataset], cache: SampleCache):
        found = list(sources)
        self.negatives = _negatives_of_all(found, cache)
        super().__init__(teacher, found, cache)

    def question(self, data: Dataset, content: dict[str, Any]) -> list[tuple[str, str]]:
        """The pairs that the teacher reads of a triplet: the query with the target and with each hard negative.

        Raises:
            Unusable: a text is missing in its language, or the triplet has not K negatives.
        """
        language = self.teacher.language
        if len(content["negatives"]) != self.negatives:
            raise Unusable(f"{len(content['negatives'])} negatives, and the first triplet has {self.negatives}")
        query, *others = (first_in(language, texts) for texts in _parts(content))
        pairs = [(query, other) for other in others if query is not None and other is not None]
        if len(pairs) < len(others):
            raise Unusable(f"not all texts in {language!r}, which the teacher reads")
        return pairs

    def sample(self, data: Dataset, index: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """As `TaughtTexts.sample`. Without a `language` alternatives need not say the same: then only those that the
        teacher read are there."""
        pixels, texts = super().sample(data, index)
        return pixels, texts if self.teacher.language else {**texts, **as_read(texts)}

    def maker(self, weights: str, max_tokens: int) -> dict[str, object]:
        """The weights alone: a cross-encoder cuts where it says itself."""
        return {"weights": weights}

    def _origin(self, data: Dataset) -> dict[str, object]:
        return {**super()._origin(data), "scores": 1 + self.negatives}


class OwnScores:
    """In the place of `ScoredTexts`, of triplets whose data have the scores themselves, as `scores`."""

    def __init__(self, sources: Iterable[Dataset], cache: SampleCache):
        self.cache, self.negatives = cache, _negatives_of_all(list(sources), cache)

    def sample(self, data: Dataset, index: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """As `ScoredTexts.sample`."""
        pixels, texts = self.cache.sample(data, index)
        if texts.get("scores") is None:
            raise ShardError(
                f"{data.directory}: sample {data.row(index).key} has no scores, and the recipe names no teacher.model"
            )
        scores = torch.tensor(texts["scores"], dtype=torch.float32)
        return pixels, {**texts, **as_read(texts), "teacher": scores}

    def said_by(self, data: Dataset) -> str:
        return "its own scores"

    def check(self, max_tokens: int) -> int:
        """1 + K. There is nothing to check: a triplet without scores is replaced when it is drawn."""
        return 1 + self.negatives


def as_read(content: dict[str, Any]) -> dict[str, Any]:
    """Of each part of a triplet the first text alone."""
    query, target, *negatives = (texts[:1] for texts in _parts(content))
    return {"query": query, "target": target, "negatives": negatives}


def _parts(content: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [content["query"], content["target"], *content["negatives"]]


def _negatives_of_all(sources: list[Dataset], cache: SampleCache) -> int:
    """K of all triplets.

    Raises:
        UserError: pairs among them, or data sets whose K differ.
    """
    for data in sources:
        if data.kind != "text-triplets":
            raise UserError(
                f"{data.directory} holds {data.kind}, and teacher.loss 'margin_mse' compares a target with hard "
                "negatives; name text-triplets, such as `data-prep negatives` makes of pairs"
            )
    counts = {data.directory: negatives_of(data, cache) for data in sources}
    first, *others = counts
    for other in others:
        if counts[other] != counts[first]:
            raise UserError(
                f"the first triplet of {other} has {counts[other]} negatives and that of {first} {counts[first]}; all "
                "triplets of a stage need as many"
            )
    return counts[first]
