"""Text pairs with what a teacher says of them, from the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from data_prep.shards import Dataset, ShardError, Unusable

from stage_trainer.data.samples import SampleCache
from stage_trainer.data.stored_vectors import StoredVectors
from stage_trainer.errors import UserError
from stage_trainer.recipe.teacher import TeacherConfig


class Taught(Protocol):
    """Texts with what a teacher says of them, float32 `[T]`, as `teacher` among a sample's texts."""

    def sample(self, data: Dataset, index: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """As `SampleCache.sample`."""

    def said_by(self, data: Dataset) -> str:
        """Who the teacher of a data set was, for the fingerprint of a run."""

    def check(self, max_tokens: int) -> int:
        """T; UserError if what the teacher says is not there, or of texts that were cut elsewhere."""


class TaughtTexts:
    """A stage's data sets of text pairs; a sample has the teacher's vector as `teacher` among its texts.

    Args:
        teacher: names the folder of the vectors.
        sources: the data sets.
        cache: gives their texts.
    """

    def __init__(self, teacher: TeacherConfig, sources: Iterable[Dataset], cache: SampleCache):
        self.teacher, self.cache = teacher, cache
        self.stores = {data.directory: self._store(data) for data in sources}

    def question(self, data: Dataset, content: dict[str, Any]) -> Any:
        """What the teacher reads of a sample: its first text in the teacher's language.

        Raises:
            Unusable: there is none.
        """
        language = self.teacher.language
        texts = [*content["query"], *content["target"]]
        if (found := first_in(language, texts)) is None:
            raise Unusable(f"no text in {language!r}, which the teacher reads")
        return found

    def maker(self, weights: str, max_tokens: int) -> dict[str, object]:
        """What the vectors depend on beside the data and the name of the teacher: its weights (their hash), and where
        a stage cuts texts."""
        return {"weights": weights, "max_tokens": max_tokens}

    def sample(self, data: Dataset, index: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """As `SampleCache.sample`, with the vector, float32 `[D]`."""
        pixels, texts = self.cache.sample(data, index)
        found = self.stores[data.directory].of(index)
        if isinstance(found, str):
            raise ShardError(found)
        return pixels, {**texts, "teacher": found[0]}

    def said_by(self, data: Dataset) -> str:
        """Who the teacher of a data set was, for the fingerprint of a run: the hash of its weights and settings.

        Raises:
            UserError: it said nothing yet.
        """
        store = self.stores[data.directory]
        if not store.maker:
            raise self._lacking(store, 0)
        return f"{self.teacher.model} {store.maker}"

    def check(self, max_tokens: int) -> int:
        """The width of the vectors. The first rank of each machine reads them all, for all of its ranks.

        Args:
            max_tokens: of a text, as the stage has it.

        Raises:
            UserError: some are missing or damaged, of another teacher than the others, of texts that were cut
                elsewhere, or not all of one width.
        """
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        for store in self.stores.values():
            shards = range(len(store.data.shard_sizes))
            if wrong := store.missing() or [n for n in shards if first and store.damaged(n)]:
                raise self._lacking(store, wrong[0])
            weights = next(iter(self.stores.values())).maker.get("weights", "")
            store.check_maker(self.maker(weights, max_tokens))
        widths = {store.width for store in self.stores.values()}
        if len(widths) != 1:
            raise UserError(
                f"the teacher's vectors in {self.teacher.folder} have {sorted(widths)} numbers; expected one width: "
                "remove the folder and run `stage-trainer embed` again"
            )
        return widths.pop()

    def _lacking(self, store: StoredVectors, shard: int) -> UserError:
        return UserError(
            f"{store.directory} lacks what the teacher {self.teacher.model} says of shard {shard} of "
            f"{store.data.directory}, or it is damaged; run `stage-trainer embed` with this recipe and stage"
        )

    def _store(self, data: Dataset) -> StoredVectors:
        assert self.teacher.folder is not None  # a rule of recipes
        return StoredVectors(Path(self.teacher.folder).expanduser(), data, self._origin(data))

    def _origin(self, data: Dataset) -> dict[str, object]:
        return {"teacher": self.teacher.model, "language": self.teacher.language}


def first_in(language: str | None, texts: Iterable[dict[str, Any]]) -> str | None:
    """The first of some texts that is in a language; of all for None. None if there is none."""
    return next((text["text"] for text in texts if language in (None, text["language"])), None)
