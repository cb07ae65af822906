"""A request for a caption, its key, and what an answer says beside the caption."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from data_prep.shards.format import JsonObject


@dataclass(frozen=True)
class Request:
    """A request to send: `options` are fields of the body, `text` is the prompt, `place` its number in the ledger."""

    id: str
    image: str
    language: str
    model: str
    prompt_version: str
    options: JsonObject
    text: str
    dataset: str
    number: int
    place: int


@dataclass(frozen=True)
class Usage:
    """The metadata of an answer; None where the service gives none."""

    model: str | None = None
    fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def request_id(image: str, language: str, prompt_version: str, model: str, options: JsonObject) -> str:
    """The key of a request: 128 bits of the sha256 of everything that the caption depends on."""
    parts = json.dumps([image, language, prompt_version, model, options], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]
