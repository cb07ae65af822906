"""The texts of a sample with their language and origin, and the JSON that holds them in the shards."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_prep.shards.format import JsonObject

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Text:
    """One text in one language.

    role: "name" (a short caption; evaluation uses these), "further" (left out of published figures), "keywords",
        "long", "title", "body", "query" (answered by a page; evaluated), or "key" (of a page without a query).
    origin: "human", "human:joined" (human texts concatenated by us), "machine-translation" or "synthetic:MODEL…".
    id, score: of a query: its name in its benchmark, and how well the page answers it (its grade, above 0).
    """

    text: str
    language: str
    role: str
    origin: str = "human"
    id: str = ""
    score: float | None = None

    def record(self) -> JsonObject:
        """The TEXT of the shard format."""
        fields: JsonObject = {
            "text": self.text, "language": self.language, "origin": self.origin, "role": self.role
        }  # fmt: skip
        if self.id:
            fields["id"] = self.id
        if self.score is not None:
            fields["score"] = self.score
        return fields


def clean(text: str) -> str:
    """Composed characters (NFC), single spaces, no space around."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def captions_json(captions: Iterable[Text], *, source: str, item: str) -> bytes:
    """The .json of a sample of images with captions."""
    return compact_json({"captions": _records(captions), "source": source, "item": item})


def texts_json(
    query: Iterable[Text],
    target: Iterable[Text],
    negatives: Sequence[Iterable[Text]] | None = None,
    *,
    source: str,
    item: str,
    score: float | None = None,
    scores: Sequence[float] | None = None,
) -> bytes:
    """The .json of a text pair, or with `negatives` of a triplet. score: how alike the two are, for evaluation. scores:
    a teacher's, of the query with the target and with each negative."""
    fields: JsonObject = {"query": _records(query), "target": _records(target)}
    if negatives is not None:
        fields["negatives"] = [_records(negative) for negative in negatives]
    if score is not None:
        fields["score"] = score
    if scores is not None:
        fields["scores"] = list(scores)
    return compact_json({**fields, "source": source, "item": item})


def languages_of(*texts: Iterable[Text]) -> list[str]:
    """The languages that occur, sorted."""
    return sorted({text.language for group in texts for text in group})


def _records(texts: Iterable[Text]) -> list[JsonObject]:
    return [text.record() for text in texts]


def compact_json(value: JsonObject) -> bytes:
    """The .json of a sample."""
    return _encode(value).encode("utf-8", errors="replace")  # an `item` may hold half a character; texts are checked
