"""Samples with what a teacher says of them, from the disk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from data_prep.shards import Dataset, ShardError

from stage_trainer.data.samples import SampleCache
from stage_trainer.data.stored_vectors import StoredVectors
from stage_trainer.errors import UserError
from stage_trainer.recipe.teacher import TeacherConfig


class Taught(Protocol):
    """Data sets of whose samples a teacher says something: numbers, float32 `[T]`, of each.

    Attributes:
        of: what it says it of ("texts", "images", "captions").
    """

    of: ClassVar[str]

    def attached(self, data: Dataset, index: int, content: dict[str, Any]) -> dict[str, Any]:
        """A sample's texts, as `with_said` has them, with what this teacher says added to `teacher`: `{"texts" or
        "images": [T]}`, and to each caption's `{"captions": [T]}`. As they are if the data set is none of these.

        Raises:
            ShardError: the teacher says nothing of the sample.
        """

    def said_by(self, data: Dataset) -> str | None:
        """Who the teacher of a data set was, for the fingerprint of a run; None if the data set is none of these."""

    @property
    def width(self) -> int:
        """T."""

    @property
    def weights(self) -> str:
        """The hash of the teacher's weights; empty if nobody knows it, or there are none."""

    def check(self, weights: str, max_tokens: int) -> int:
        """T; UserError if what a teacher of these weights says is not there, or is of texts that were cut elsewhere."""


class Said(ABC):
    """What a teacher says of one kind of things in a stage's data sets, kept on the disk.

    Args:
        teacher: names the folder of the vectors.
        sources: the data sets.
        cache: gives their samples.
    """

    of: ClassVar[str]

    def __init__(self, teacher: TeacherConfig, sources: Iterable[Dataset], cache: SampleCache):
        self.teacher, self.cache = teacher, cache
        self.stores = {data.directory: self._store(data) for data in sources}

    @abstractmethod
    def questions(self, data: Dataset, index: int) -> list[Any]:
        """What the teacher reads of a sample.

        Raises:
            Unusable: it can read nothing of it.
            ShardError, ImageError: as `SampleCache.sample`.
        """

    def maker(self, weights: str, max_tokens: int) -> dict[str, object]:
        """What the vectors depend on beside the data and the name of the teacher: its weights (their hash), and where
        a stage cuts texts."""
        return {"weights": weights, "max_tokens": max_tokens}

    def attached(self, data: Dataset, index: int, content: dict[str, Any]) -> dict[str, Any]:
        """As `Taught.attached`."""
        if data.directory not in self.stores:
            return content
        found = self.stores[data.directory].of(index)
        if isinstance(found, str):
            raise ShardError(found)
        return self._with(content, found)

    def _with(self, content: dict[str, Any], vectors: torch.Tensor) -> dict[str, Any]:
        """A sample's texts with its vectors, float32 `[V, T]`, one for each question."""
        return {**content, "teacher": {**content["teacher"], self.of: vectors[0]}}

    def said_by(self, data: Dataset) -> str | None:
        """As `Taught.said_by`: the hash of its weights and settings.

        Raises:
            UserError: it said nothing yet.
        """
        if (store := self.stores.get(data.directory)) is None:
            return None
        if not store.maker:
            raise self._lacking(store, 0)
        return f"{self.teacher.model} {store.maker}"

    @cached_property
    def width(self) -> int:
        """As `Taught.width`, of the first data set."""
        return next(iter(self.stores.values())).width

    @property
    def weights(self) -> str:
        """As `Taught.weights`, of the first data set."""
        return str(next(iter(self.stores.values())).maker.get("weights", ""))

    def check(self, weights: str, max_tokens: int) -> int:
        """The width of the vectors. The first rank of each machine reads them all, for all of its ranks.

        Args:
            weights: the hash of the teacher's.
            max_tokens: of a text, as the stage has it.

        Raises:
            UserError: some are missing or damaged, of another teacher, of texts that were cut elsewhere, or not all of
                one width.
        """
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        for store in self.stores.values():
            shards = range(len(store.data.shard_sizes))
            if wrong := store.missing() or [n for n in shards if first and store.damaged(n)]:
                raise self._lacking(store, wrong[0])
            store.check_maker(self.maker(weights, max_tokens))
        widths = {store.width for store in self.stores.values()}
        if len(widths) > 1:
            raise UserError(
                f"the teacher's vectors in {self.teacher.folder} have {sorted(widths)} numbers; expected one width: "
                "remove the folder and run `stage-trainer embed` again"
            )
        return self.width

    def _lacking(self, store: StoredVectors, shard: int) -> UserError:
        return UserError(
            f"{store.directory} lacks what the teacher {self.teacher.model} says of shard {shard} of "
            f"{store.data.directory}, or it is damaged; run `stage-trainer embed` with this recipe and stage"
        )

    def _store(self, data: Dataset) -> StoredVectors:
        assert self.teacher.folder is not None  # a rule of recipes
        return StoredVectors(Path(self.teacher.folder).expanduser(), data, self._origin())

    def _origin(self) -> dict[str, object]:
        return {"teacher": self.teacher.model, "language": self.teacher.language}


def with_said(all_taught: Iterable[Taught], data: Dataset, index: int, content: dict[str, Any]) -> dict[str, Any]:
    """A sample's texts with what teachers say as `teacher`, whatever the data themselves call so. Errors as
    `Taught.attached`."""
    content = {**content, "teacher": {}}
    if "captions" in content:
        content["captions"] = [{**caption, "teacher": {}} for caption in content["captions"]]
    for taught in all_taught:
        content = taught.attached(data, index, content)
    return content


def first_in(language: str | None, texts: Iterable[dict[str, Any]]) -> str | None:
    """The first of some texts that is in a language; of all for None. None if there is none."""
    return next((text["text"] for text in texts if language in (None, text["language"])), None)
