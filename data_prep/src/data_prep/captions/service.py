"""The service: an OpenAI-compatible endpoint (OpenAI's own, or vLLM), called without retries.

The `openai` client does the transport, with its retries off: an answer costs money, so the ledger decides what may be
sent again. Every call ends in one of five outcomes.
"""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from data_prep.captions import faults, secrets
from data_prep.captions.faults import error_message
from data_prep.captions.limited import limited_client
from data_prep.captions.request import Request
from data_prep.errors import UserError, needs
from data_prep.shards.format import JsonObject

if TYPE_CHECKING:
    from openai import APIStatusError

DEFAULT_URL = "https://api.openai.com/v1"
# A gateway timed out; the model behind it may have answered all the same.
_TIMED_OUT = {504, 524}
# Errors after which the request cannot have reached the service: there was no connection.
_NEVER_LEFT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"}


@dataclass(frozen=True)
class Answered:
    """A 200 with its raw bytes."""

    status: int
    raw: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Declined:
    """A 4xx about this request alone (a content filter, an unreadable image), as long as others are answered."""

    status: int
    raw: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class NotDone:
    """Nothing was computed: 429, 5xx, or no connection (without a status). `limited` for the 429."""

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
    """No request would be answered: a wrong key, no credit, no such model. `means`: one of `faults.STOPPING`."""

    status: int
    message: str
    means: int


Outcome = Answered | Declined | NotDone | Lost | Stop


class Service:
    """An endpoint and a key.

    Args:
        url: the base URL, up to `/v1`; None: `OPENAI_BASE_URL`, else OpenAI's. It may hold a user and a password, which
            are sent instead of the key, and parameters, which are added to every call.
        key_variable: name of the environment variable that holds the key, which may be empty for a service without
            keys. The key and the secrets of the URL are removed from everything that is stored or shown.
        timeout: of a whole answer, in seconds; see `limited_client`.

    Attributes:
        url: as it may be shown.

    Raises:
        UserError: `openai` is not installed, the URL is none, the key is malformed or, for OpenAI's own service,
            missing, the environment's proxy cannot be used, or the timeout is not positive.
    """

    def __init__(self, url: str | None = None, *, key_variable: str = "OPENAI_API_KEY", timeout: float = 180.0) -> None:
        if timeout <= 0:
            raise UserError(f"{timeout} seconds for an answer: expected more than 0")
        openai = needs("openai", extra="captions", what="asking for captions")
        url = _checked((url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/"))
        key = _key_in(key_variable)
        if not key and url == DEFAULT_URL:
            raise UserError(f"no API key: set the environment variable {key_variable}, or name another with --key-env")
        self._secrets = secrets.Secrets(key, [*secrets.of_url(url), *secrets.of_proxies()])
        self.url = secrets.shown_url(url)
        self.openai = openai
        self.client, by_password = self._connected(url, key, timeout)
        self._credentials = "password in the URL" if by_password else f"API key in {key_variable}"
        for handler in logging.getLogger().handlers:  # OPENAI_LOG=debug makes one
            handler.addFilter(self._secrets)

    def _connected(self, url: str, key: str, timeout: float) -> tuple[Any, bool]:
        """The client, and whether a password goes with it. It gets the URL's secrets apart, to show them nowhere."""
        address = urlsplit(url)
        user, at, host = address.netloc.rpartition("@")
        headers = {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if at else {}
        try:
            client = limited_client(self.openai, timeout)
        except Exception as error:
            if type(error).__name__ not in ("ImportError", "ValueError", "InvalidURL"):  # the last one is httpx's own
                raise
            raise UserError(
                f"the proxy in the environment (HTTPS_PROXY, ALL_PROXY, …) cannot be used ({self.hide(str(error))}); "
                "mend it, or list the service's host in NO_PROXY"
            ) from None
        return self.openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=address._replace(netloc=host, query="", fragment="").geturl(),
            default_query=dict(parse_qsl(address.query, keep_blank_values=True)),
            default_headers=headers,
            max_retries=0,
            timeout=client.timeout,
            http_client=client,
        ), bool(at)

    async def ask(self, request: Request, mime: str, image: bytes) -> Outcome:
        """Make one call, without retries."""
        body = request_body(request, mime, image)
        model, messages = body.pop("model"), body.pop("messages")
        openai = self.openai
        try:
            answer = await self.client.chat.completions.with_raw_response.create(
                model=model, messages=messages, extra_body=body
            )
            raw = self._secrets.hide_in(answer.http_response.content, message=False)
            return Answered(200, raw, answer.headers)
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            note = self.hide(f"{type(cause or error).__name__}: {cause or error}")
            return NotDone(None, note) if type(cause).__name__ in _NEVER_LEFT else Lost(note)

    def stopping_error(self, status: int, message: str, means: int) -> UserError:
        """The error for the user when the service will not answer any request."""
        what = {
            401: f"refuses the {self._credentials}",
            402: "has no money left for this key",
            403: f"does not let the {self._credentials} do this",
            404: "knows no such model or address",
        }.get(means, "refuses")
        return UserError(f"{self.url} {what} (status {status}: {message}); nothing was tried again")

    def hide(self, text: str) -> str:
        """`text` without keys and passwords, in case the service or a proxy repeated them."""
        return self._secrets.hide(text)

    def hide_in(self, raw: bytes, *, message: bool) -> bytes:
        """The same for an answer's bytes; `message`: of an error, which holds no caption."""
        return self._secrets.hide_in(raw, message=message)

    def _refused(self, error: APIStatusError) -> Outcome:
        status, headers = error.status_code, error.response.headers
        raw = self.hide_in(error.response.content, message=True)
        message, means = error_message(raw), faults.stopping(status, raw)
        if means is not None:
            return Stop(status, message, means)
        if status in _TIMED_OUT:
            return Lost(f"status {status}: {message}")
        too_much = faults.limited(status, raw)
        if too_much or status in (408, 409, 425) or status >= 500:
            return NotDone(status, message, too_much, headers)
        return Declined(status, raw, headers)


def _key_in(variable: str) -> str:
    """The key in an environment variable. UserError, which never shows it, for what is none."""
    if variable not in os.environ and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
        raise UserError("--key-env: expected the name of an environment variable, such as OPENAI_API_KEY, not the key")
    key = os.environ.get(variable, "").strip()
    # A header cannot hold anything else; the client's own error would show the key in a form that `hide` misses.
    if not all("!" <= character <= "~" for character in key):
        raise UserError(
            f"the API key in {variable} has a space, a line break or a character outside ASCII in it, so it is "
            "no key; set the variable to the key alone"
        )
    return key


def _checked(url: str) -> str:
    """The URL itself; UserError for one that no request could go to."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not all("!" <= character <= "~" for character in url):
        shown = secrets.shown_url(url)
        raise UserError(f"--url {shown!r}: expected http:// or https://, a host and a path, http://localhost:8000/v1")
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
