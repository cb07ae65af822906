"""Triplets with the scores of a cross-encoder, from the disk or in the data themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from data_prep.shards import Dataset, ShardError, Unusable

from stage_trainer.data.hard_negatives import negatives_of
from stage_trainer.data.samples import SampleCache
from stage_trainer.data.taught import Said, first_in
from stage_trainer.errors import UserError
from stage_trainer.recipe.teacher import TeacherConfig


class ScoredTexts(Said):
    """A stage's data sets of triplets; a sample has the teacher's scores, of the query with the target and with each of
    the K hard negatives, float32 `[1 + K]`."""

    of: ClassVar[str] = "texts"

    def __init__(self, teacher: TeacherConfig, sources: Iterable[Dataset], cache: SampleCache):
        found = list(sources)
        self.negatives = _negatives_of_all(found, cache)
        super().__init__(teacher, found, cache)

    def questions(self, data: Dataset, index: int) -> list[Any]:
        """The pairs that the teacher reads of a triplet, in one list: the query with the target and with each hard
        negative. Errors as `Said.questions`; Unusable also if the triplet has not K negatives."""
        content, language = self.cache.sample(data, index)[1], self.teacher.language
        if len(content["negatives"]) != self.negatives:
            raise Unusable(f"{len(content['negatives'])} negatives, and the first triplet has {self.negatives}")
        query, *others = (first_in(language, texts) for texts in _parts(content))
        pairs = [(query, other) for other in others if query is not None and other is not None]
        if len(pairs) < len(others):
            raise Unusable(f"not all texts in {language!r}, which the teacher reads")
        return [pairs]

    def _with(self, content: dict[str, Any], vectors: torch.Tensor) -> dict[str, Any]:
        """Without a `language` alternatives need not say the same: then only those that the teacher read are there."""
        found = super()._with(content, vectors)
        return found if self.teacher.language else {**found, **as_read(found)}

    def maker(self, weights: str, max_tokens: int) -> dict[str, object]:
        """The weights alone: a cross-encoder cuts where it says itself."""
        return {"weights": weights}

    def _origin(self) -> dict[str, object]:
        return {**super()._origin(), "scores": 1 + self.negatives}


class OwnScores:
    """In the place of `ScoredTexts`, of triplets whose data have the scores themselves, as `scores`."""

    of: ClassVar[str] = "texts"
    weights = ""

    def __init__(self, sources: Iterable[Dataset], cache: SampleCache):
        found = list(sources)
        self.directories = {data.directory for data in found}
        self.width = 1 + _negatives_of_all(found, cache)

    def attached(self, data: Dataset, index: int, content: dict[str, Any]) -> dict[str, Any]:
        """As `ScoredTexts.attached`."""
        if data.directory not in self.directories:
            return content
        if content.get("scores") is None:
            raise ShardError(
                f"{data.directory}: sample {data.row(index).key} has no scores, and the recipe names no teacher.model"
            )
        scores = torch.tensor(content["scores"], dtype=torch.float32)
        return {**content, **as_read(content), "teacher": {"texts": scores}}

    def said_by(self, data: Dataset) -> str | None:
        return "its own scores" if data.directory in self.directories else None

    def check(self, weights: str, max_tokens: int) -> int:
        """1 + K. There is nothing to check: a triplet without scores is replaced when it is drawn."""
        return self.width


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
