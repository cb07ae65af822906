"""The service: an OpenAI-compatible endpoint (OpenAI's own, or vLLM), called without retries.

The `openai` client does the transport, with its retries off: an answer costs money, so the ledger decides what may be
sent again. Every call ends in one of four outcomes.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from data_prep.captions.ledger import Request
from data_prep.captions.limited import limited_client
from data_prep.errors import UserError, needs
from data_prep.shards.format import JsonObject, parse_json

if TYPE_CHECKING:
    from openai import APIStatusError

DEFAULT_URL = "https://api.openai.com/v1"
_STOPPING_CODES = {"insufficient_quota", "billing_hard_limit_reached", "model_not_found", "invalid_api_key"}
# A gateway timed out; the model behind it may have answered all the same.
_TIMED_OUT = {504, 524}
# Errors after which the request cannot have reached the service: there was no connection.
_NEVER_LEFT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"}


@dataclass(frozen=True)
class Answered:
    """A 200, or a 4xx about this request alone (a content filter, an unreadable image), with its raw bytes."""

    status: int
    raw: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class NotDone:
    """Nothing was computed: 429, 5xx, or no connection. `limited` for the 429."""

    status: int | None
    note: str
    limited: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost:
    """The connection broke or timed out after the request was sent: it may have been computed and billed."""

    note: str


@dataclass(frozen=True)
class Stop:
    """No request would be answered: a wrong key, no credit, no such model."""

    status: int
    message: str


Outcome = Answered | NotDone | Lost | Stop


class Service:
    """An endpoint and a key.

    Args:
        url: the base URL, up to `/v1`; None: `OPENAI_BASE_URL`, else OpenAI's.
        key_variable: name of the environment variable that holds the key, which may be empty for a service without
            keys. The key is removed from everything that is stored or shown.
        timeout: of a whole answer, in seconds; see `limited_client`.

    Raises:
        UserError: `openai` is not installed, the URL is none, the key is malformed or, for OpenAI's own service,
            missing, or the timeout is not positive.
    """

    def __init__(self, url: str | None = None, *, key_variable: str = "OPENAI_API_KEY", timeout: float = 180.0) -> None:
        if timeout <= 0:
            raise UserError(f"{timeout} seconds for an answer: expected more than 0")
        openai = needs("openai", extra="captions", what="asking for captions")
        self.url = _checked((url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/"))
        self.key_variable = key_variable
        self._key = os.environ.get(key_variable, "").strip()
        # A header cannot hold anything else; the client's own error would show the key in a form that `hide` misses.
        if not all("!" <= character <= "~" for character in self._key):
            raise UserError(
                f"the API key in {key_variable} has a space, a line break or a character outside ASCII in it, so it is "
                "no key; set the variable to the key alone"
            )
        if not self._key and self.url == DEFAULT_URL:
            raise UserError(f"no API key: set the environment variable {key_variable}, or name another with --key-env")
        self.openai = openai
        client = limited_client(openai, timeout)
        self.client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self.url, max_retries=0, timeout=client.timeout, http_client=client
        )

    async def ask(self, request: Request, mime: str, image: bytes) -> Outcome:
        """Make one call, without retries."""
        body = request_body(request, mime, image)
        model, messages = body.pop("model"), body.pop("messages")
        openai = self.openai
        try:
            answer = await self.client.chat.completions.with_raw_response.create(
                model=model, messages=messages, extra_body=body
            )
            return Answered(200, self.hide(answer.http_response.content), answer.headers)
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            note = self.hide(f"{type(cause or error).__name__}: {cause or error}".encode()).decode()
            return NotDone(None, note) if type(cause).__name__ in _NEVER_LEFT else Lost(note)

    def stopping_error(self, status: int, message: str) -> UserError:
        """The error for the user when the service will not answer any request."""
        what = {
            401: f"refuses the API key in {self.key_variable}",
            403: f"does not let the API key in {self.key_variable} do this",
            404: "knows no such model or address",
            429: "has no money left for this key",
        }.get(status, "refuses")
        return UserError(f"{self.url} {what} (status {status}: {message}); nothing was tried again")

    def hide(self, data: bytes) -> bytes:
        """`data` without the key, in case the service repeated it."""
        return data.replace(self._key.encode(), b"[API key]") if self._key else data

    def _refused(self, error: APIStatusError) -> Outcome:
        status, headers = error.status_code, error.response.headers
        raw = self.hide(error.response.content)
        message = error_message(raw)
        if status in (401, 402, 403, 404) or error.code in _STOPPING_CODES or error.type in _STOPPING_CODES:
            return Stop(status, message)
        if status in _TIMED_OUT:
            return Lost(f"status {status}: {message}")
        if status in (408, 409, 425, 429) or status >= 500:
            return NotDone(status, message, status == 429, headers)
        return Answered(status, raw, headers)


def _checked(url: str) -> str:
    """The URL itself; UserError for one that no request could go to."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not all("!" <= character <= "~" for character in url):
        raise UserError(f"--url {url!r}: expected http:// or https://, a host and a path, http://localhost:8000/v1")
    return url


def request_body(request: Request, mime: str, image: bytes) -> JsonObject:
    """The JSON of a chat completion: the prompt and the image as a data URL."""
    url: dict[str, str] = {"url": f"data:{mime};base64,{base64.b64encode(image).decode()}"}
    if request.options["detail"] is not None:
        url["detail"] = request.options["detail"]
    content = [{"type": "text", "text": request.text}, {"type": "image_url", "image_url": url}]
    return {
        "model": request.model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": request.options["max_tokens"],
        **request.options["body"],
    }


def error_message(raw: bytes) -> str:
    """The message of an error's body, in one short line."""
    try:
        body = parse_json(raw)
        error = body.get("error", body)
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = raw.decode("utf-8", "replace")
    return " ".join(str(message).split())[:300].encode("utf-8", "replace").decode() or "no message"
