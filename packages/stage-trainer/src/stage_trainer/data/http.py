"""Requests to web servers: with a deadline, redirected nowhere that the user did not mean, failures in plain words."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import errno
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import IO

from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import without_credentials

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk."""


class Failure(Exception):
    """Why a file could not be fetched.

    Args:
        reason: what was found, without credentials.
        again: whether another attempt may help.
        wait: seconds to wait before it, if the server asks for it.
        missing: whether there is no such file.
        wrong: whether the content that arrived is not the file's.
    """

    def __init__(
        self, reason: str, *, again: bool = False, wait: float = 0.0, missing: bool = False, wrong: bool = False
    ):
        super().__init__(reason)
        self.again, self.wait, self.missing, self.wrong = again, wait, missing, wrong


@contextlib.contextmanager
def response_to(
    request: urllib.request.Request, url: str, settings: RemoteConfig
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request for a URL, to be read within `remote.deadline`; what goes wrong is a `Failure`."""
    deadline = Deadline(settings.deadline)
    try:
        with deadline, opener_with(deadline).open(request, timeout=settings.timeout) as response:
            yield response
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        raise _http_failure(error) from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: read1 from a closed connection
        reason: object = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, OSError) and reason.errno in FULL:
            raise
        again = not isinstance(reason, ssl.SSLCertVerificationError | http.client.InvalidURL)
        if deadline.passed:
            reason = f"not whole after remote.deadline={settings.deadline:g} s"
        elif isinstance(reason, TimeoutError):
            reason = f"no answer for {settings.timeout:g} s"
        elif isinstance(reason, http.client.IncompleteRead):
            reason = "the connection was cut"
        raise Failure(without_credentials(str(reason) or type(reason).__name__, url), again=again) from error
    if deadline.passed:  # a body without a length ends where its connection does
        raise Failure(f"not whole after remote.deadline={settings.deadline:g} s", again=True)


def request_of(url: str) -> urllib.request.Request:
    """A request for a URL of http or https; the credentials in it go to its own server only."""
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    request = urllib.request.Request(f"{scheme}://{rest.removeprefix(user + at)}", headers={"User-Agent": "trilith"})
    if at:
        credentials = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {credentials}")
    return request


def opener_with(deadline: Deadline) -> urllib.request.OpenerDirector:
    """Opens URLs until the deadline, with `Redirects`' limits."""
    return urllib.request.build_opener(Redirects, *_connections_with(deadline))


class Deadline:
    """Shuts sockets down after so many seconds: a timeout counts from each byte, of which one may come at a time."""

    def __init__(self, seconds: float):
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        self._sockets.append(connected)

    def _end(self) -> None:
        self.passed = True
        for connected in self._sockets:
            with contextlib.suppress(OSError):  # it is closed
                connected.shutdown(socket.SHUT_RDWR)


def _connections_with(deadline: Deadline) -> tuple[urllib.request.BaseHandler, urllib.request.BaseHandler]:
    """Handlers of http and https whose sockets the deadline watches."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    class Encrypted(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    class OfPlain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class OfEncrypted(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Encrypted, req)

    return OfPlain(), OfEncrypted()


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows no server to what only this machine or its network can reach, and none from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        here, there = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        allowed = ("https",) if here.scheme == "https" else ("http", "https")
        if there.scheme not in allowed or (there.netloc != here.netloc and _is_local(there.hostname or "")):
            raise Failure(
                f"the server redirects to {without_credentials(newurl)}, which is not followed; if that is the place, "
                "name it instead"
            )
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        fp.close()  # or urllib reads its body into memory, however long it is
        return followed


def _is_local(host: str) -> bool:
    """Whether a name leads to this machine or to a private network."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False  # then nothing will connect either
    return not all(ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_global for address in found)


def _http_failure(error: urllib.error.HTTPError) -> Failure:
    with contextlib.closing(error):  # its connection, which a redirection has closed already
        reason = f"{error.code} {error.reason}"
        if error.code in (404, 410):
            return Failure(reason, missing=True)
        if error.code in (401, 403):
            return Failure(f"{reason}: the credentials are missing, wrong or out of date, or there is no such file")
        again = error.code in (408, 425, 429) or error.code >= 500
        return Failure(reason, again=again, wait=_retry_after(error.headers.get("Retry-After")))


def _retry_after(value: str | None) -> float:
    """Seconds to wait, from a number of seconds or a date (RFC 9110, 10.2.3); 0 if the header says nothing."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
