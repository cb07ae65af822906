"""The bytes of a chat completion: its text, whether the model ended it by itself, and what it counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.captions.request import Usage
from data_prep.shards.format import parse_json

# `finish_reason` of services for the two that have a name of their own in the ledger.
_TRUNCATED = {"length", "max_tokens", "max_output_tokens", "model_length"}
_REFUSED = {"content_filter", "safety", "refusal", "recitation", "prohibited_content", "blocklist"}
# Parts of a list-shaped content that are no part of what is said.
_THOUGHTS = {"thinking", "reasoning", "redacted_thinking"}


@dataclass(frozen=True)
class Answer:
    """What an answer says. text: None if it cannot be read. fault: a reason to reject it whatever the text."""

    text: str | None
    fault: str | None
    usage: Usage


def read_answer(raw: bytes) -> Answer:
    """The answer in the bytes of a 200; `fault` is "malformed" if there is none in them."""
    body: Any = None
    try:
        body = parse_json(raw)
        choice = body["choices"][0]
        message = choice["message"]
        text, refused = _content(message.get("content"))
        text.encode()  # or ValueError: half a character could not be stored
        fault = "refusal" if refused or message.get("refusal") else _unfinished(choice.get("finish_reason"))
        fault = fault or (
            "unfinished" if _says(body.get("error")) else None
        )  # it broke off, whatever is said of the end
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer(None, "malformed", _usage(body))
    return Answer(text, fault, _usage(body))


def _says(error: object) -> bool:
    """Whether an error says anything; some gateways send one of zeros and empty texts with every answer."""
    return any(error.values()) if isinstance(error, dict) else bool(error)


def _content(content: object) -> tuple[str, bool]:
    """(text, whether a part refuses) of a text, of nothing, or of a list of parts, which are joined as they are.

    Raises:
        TypeError: it is something else, or a part says something that is no text.
    """
    if content is None or isinstance(content, str):
        return content or "", False
    if not isinstance(content, list):
        raise TypeError("content is neither text nor a list")
    texts, refused = [], False
    for part in content:
        kind = part if isinstance(part, str) else part["type"]
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "output_text"):
            texts.append(part["text"])
        elif kind == "refusal":
            refused = True
        elif kind not in _THOUGHTS:
            raise TypeError(f"a part of type {kind!r}")
    return "".join(texts), refused


def _unfinished(finish: object) -> str | None:
    """The fault of a `finish_reason`: only "stop" says that the model had said everything."""
    name = finish.lower() if isinstance(finish, str) else ""
    if name == "stop":
        return None
    return "truncated" if name in _TRUNCATED else "refusal" if name in _REFUSED else "unfinished"


def _usage(answer: object) -> Usage:
    """Model, fingerprint and token counts of an answer, where it has them."""
    if not isinstance(answer, dict):
        return Usage()
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Usage(
        model=_text(answer.get("model")),
        fingerprint=_text(answer.get("system_fingerprint")),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _text(value: object) -> str | None:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _count(value: object) -> int | None:
    """A number of tokens; none that SQLite or a sum of costs could not hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
