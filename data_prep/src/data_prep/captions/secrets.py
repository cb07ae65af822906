"""What must reach no screen, log, ledger or receipt: keys and passwords, also as a service or a proxy repeats them."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from urllib.request import getproxies

HIDDEN = "[hidden]"
_NO_SECRET = {"api-version", "api_version", "version", "deployment", "model", "region"}  # parameters of a URL
_LONG = re.compile(r"(?=[^/]*[0-9])(?=[^/]*[A-Za-z])[A-Za-z0-9_~.=-]{24,}")  # a part of a path that may be a key


def shown_url(url: str) -> str:
    """A URL, or what was meant to be one, as it may be shown: without user, password, values and parts like keys."""
    url = re.sub(r"^((?:[A-Za-z][\w+.-]*:)?//)?.*@", rf"\1{HIDDEN}@", url, flags=re.DOTALL)
    address, mark, query = url.partition("#")[0].partition("?")
    host, *parts = re.split(r"(?<![:/])/", address)
    address = "/".join([host, *(_LONG.sub(HIDDEN, part) for part in parts)])
    return address + mark + "&".join(map(_shown_parameter, query.split("&")))


def _shown_parameter(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if not equals:
        return HIDDEN if name else ""
    return parameter if name.lower() in _NO_SECRET else f"{name}={HIDDEN}"


def of_url(url: str) -> Iterator[str]:
    """The secrets of a URL: user, password, values of parameters, parts of the path that may be keys."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    user, at, _ = parts.netloc.rpartition("@")
    if at:
        name, colon, password = user.partition(":")
        yield from (password, f"{unquote(name)}:{unquote(password)}") if colon else (name,)
    yield from (value for name, value in parse_qsl(parts.query) if name.lower() not in _NO_SECRET)
    yield from (part for part in parts.path.split("/") if _LONG.fullmatch(part))
    yield parts.fragment


def of_proxies() -> Iterator[str]:
    """The secrets of the proxies that the environment names."""
    for url in getproxies().values():
        yield from of_url(url if "//" in url else f"http://{url}")


class Secrets:
    """Hides secrets in what is shown or stored.

    Args:
        key: the API key, or nothing. others: passwords and the like.

    As they are, percent-encoded, escaped as in JSON or HTML, in base64 as a header has them, or in the middle masked by
    the service ("sk-te***xyz", where the key begins with "sk-te"). A word of letters alone, or of fewer than six
    characters, is hidden in messages, but not in captions, which may hold it.
    """

    def __init__(self, key: str, others: Iterable[str]) -> None:
        found = {form for secret in {key, *others} if len(secret) >= 3 for form in _forms(secret)}
        certain = {form for form in found if len(form) >= 6 and not form.isalpha()}
        masked = [re.escape(key[:4]) + r"[\w.-]*[*•…][\w*•….-]*"] if len(key) >= 12 else []
        self._anywhere = _pattern(certain, masked)
        self._in_messages = _pattern(found, masked)

    def hide(self, text: str, *, message: bool = True) -> str:
        """`text` without the secrets; `message`: it is no caption."""
        pattern = self._in_messages if message else self._anywhere
        return pattern.sub(HIDDEN, text) if pattern else text

    def hide_in(self, raw: bytes, *, message: bool) -> bytes:
        """The same for bytes, which need not be UTF-8."""
        text = raw.decode("utf-8", "surrogateescape")
        hidden = self.hide(text, message=message)
        return raw if hidden == text else hidden.encode("utf-8", "surrogateescape")

    def filter(self, record: logging.LogRecord) -> bool:
        """Hide them in a log record: a filter for handlers."""
        record.msg, record.args = self.hide(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = self.hide(logging.Formatter().formatException(record.exc_info))
        return True


def _forms(secret: str) -> Iterator[str]:
    plain = unquote(secret)
    for one in {secret, plain}:
        yield from (one, quote(one, safe=""), quote(one), html.escape(one))
        for escaped in (json.dumps(one)[1:-1], json.dumps(one, ensure_ascii=False)[1:-1]):
            yield from (escaped, escaped.replace("/", "\\/"))
        yield base64.b64encode(one.encode("utf-8", "replace")).decode().rstrip("=")


def _pattern(secrets: Iterable[str], others: list[str]) -> re.Pattern[str] | None:
    longest_first = sorted({one for one in secrets if one}, key=len, reverse=True)
    patterns = [*map(re.escape, longest_first), *others]
    return re.compile("|".join(patterns)) if patterns else None
