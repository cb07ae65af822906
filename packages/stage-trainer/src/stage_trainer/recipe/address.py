"""Addresses of data: URLs and shell commands, and how they are shown without the credentials in them."""

from __future__ import annotations

import hashlib
import re
import shlex
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>[^?]*)(?P<query>\?.*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Address:
    """Where a data set is.

    Args:
        base: a URL, possibly with credentials (user:password@ or a signature in its query), or pipe:COMMAND.
        path: the data set below it, "train/image-short/emoji"; "" if the base is the data set.
    """

    base: str
    path: str = ""

    @property
    def is_pipe(self) -> bool:
        return self.base.startswith("pipe:")

    def of(self, name: str) -> str:
        """The URL (or the command) of a file of the data set, with credentials: never show it."""
        inside = f"{self.path}/{name}" if self.path else name
        if self.is_pipe:
            return self.base.removeprefix("pipe:").replace("{name}", shlex.quote(inside))
        scheme, rest, query = self._parts()
        if scheme in ("http", "https"):
            inside = urllib.parse.quote(inside)
        return f"{scheme}://{rest}/{inside}{query}"

    def shown(self, name: str) -> str:
        """The same for messages, without credentials; of a command only the first word."""
        return f"{self}/{name}"

    def __str__(self) -> str:
        if self.is_pipe:
            place = "pipe:" + (self.base.removeprefix("pipe:").split() or [""])[0] + " …"
        else:
            scheme, rest, _ = self._parts()
            place = f"{scheme}://{_without_user(rest)}"
        return f"{place}/{self.path}" if self.path else place

    @property
    def folder(self) -> Path:
        """A relative folder for local copies, named after the address."""
        if self.is_pipe:
            place = ["pipe", hashlib.sha256(self.base.encode()).hexdigest()[:16]]
        else:
            scheme, rest, _ = self._parts()
            place = [scheme, *_without_user(rest).split("/")]
        parts = [part for part in [*place, *self.path.split("/")] if part not in ("", ".", "..")]
        return Path(*parts)

    def _parts(self) -> tuple[str, str, str]:
        found = _URL.fullmatch(self.base)
        assert found is not None  # is_remote checked it
        return found["scheme"].lower(), found["rest"].rstrip("/"), found["query"] or ""


def is_remote(place: str) -> bool:
    """Whether a recipe's `corpus` or `path` is a URL or a command rather than a folder."""
    return place.startswith("pipe:") or _URL.fullmatch(place) is not None


def names_shards(path: str) -> bool:
    """Whether a recipe's `path` names tars one by one, in webdataset's notation, rather than a data set."""
    return all(each.partition("?")[0].endswith((".tar", ".tar.gz", ".tgz")) for each in path.split("::"))


def without_credentials(text: str, url: str = "") -> str:
    """A text with the user and the query removed from every URL in it, and those of `url` wherever they occur."""
    if parts := _URL.fullmatch(url):
        user = parts["rest"].partition("/")[0].rpartition("@")[0]
        for secret in filter(None, (parts["query"], user and f"{user}@")):
            text = text.replace(secret, "")
    return re.sub(r"(\w+://)([^\s/'\"@]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?", r"\1\3", text)


def _without_user(rest: str) -> str:
    host, slash, path = rest.partition("/")
    return host.rpartition("@")[2] + slash + path
