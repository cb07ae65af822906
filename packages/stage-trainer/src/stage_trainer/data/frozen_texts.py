"""Texts of which only the embeddings are read: those of a text tower that does not train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.shards import KINDS, Dataset, ShardError

from stage_trainer.data.stored_vectors import StoredVectors


class FrozenTexts:
    """The stored embeddings of all texts of a stage's data sets.

    Args:
        folder: of the stored vectors.
        sources: the data sets.
        origin: what determines the vectors beside the data: weights, tokenizer, `max_tokens`, precision.
    """

    def __init__(self, folder: Path, sources: Iterable[Dataset], origin: Mapping[str, object]):
        about = {"of": "texts", "cut": "counted", **origin}
        self.stores = {data.directory: StoredVectors(folder, data, about) for data in sources}

    def attached(self, data: Dataset, index: int, content: Mapping[str, Any]) -> dict[str, Any]:
        """A sample's texts, each with its vector as `embedding`, float32 `[D]`, and whether it was `cut`.

        Raises:
            ShardError: the sample could not be read when the vectors were made.
        """
        found = self.stores[data.directory].of(index)
        if isinstance(found, str):
            raise ShardError(found)
        cut = self.stores[data.directory].cut(index)
        rows = ({"embedding": row, "cut": number in cut} for number, row in enumerate(found))
        return {**content, **_with_rows(data.kind, content, rows)}


def _with_rows(kind: str, content: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a sample that have texts, in the order of `data_prep.shards.texts_in`, each text with its row."""

    def of(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**text, **next(rows)} for text in texts]

    return {
        part: [of(texts) for texts in content[part]] if part == "negatives" else of(content[part])
        for part in KINDS[kind]
    }
