"""Downloads one file of a data set from a URL or a command, with retries.

HTTP uses the standard library, other schemes fsspec (s3fs, gcsfs, … must be installed), and `pipe:` runs a shell
command. Credentials in a URL are used and never shown.

`requests` would save 15 of the 46 lines that speak HTTP here. But it trusts certifi's certificates instead of the
system's and SSL_CERT_FILE, and urllib3's `Retry` ends when the response's headers have arrived: the loop in `fetch`,
which also covers a cut body, a wrong size and a wrong checksum, would stay.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import errno
import hashlib
import http.client
import ipaddress
import logging
import os
import random
import select
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import Address, without_credentials

CHUNK = 1 << 20
"""Bytes per read."""
LONGEST_WAIT = 60.0
"""The longest wait between two attempts, in seconds, even if Retry-After asks for more: other ranks wait as well."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk."""

_BACKOFF = 1.0  # seconds before the second attempt; doubled for each further one
_RETRIES_OF_WRONG_BYTES = 2  # more attempts rarely turn wrong bytes into right ones
_log = logging.getLogger(__name__)


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


def check_command(base: str, settings: RemoteConfig) -> None:
    """UserError for a command that the recipe does not allow, or that lacks the {name} of the file."""
    if not base.startswith("pipe:"):
        return
    if not settings.allow_pipe:
        raise UserError(
            "the recipe has data behind pipe:, which runs a shell command; if you trust it, set remote.allow_pipe=true"
        )
    if "{name}" not in base:
        raise UserError(
            "the recipe has data behind a pipe: without {name}, which stands for the file wanted; "
            "for example 'pipe:aws s3 cp s3://bucket/corpus/{name} -'"
        )


def fetch(
    address: Address, name: str, into: Path, settings: RemoteConfig, size: int | None = None, sha256: str | None = None
) -> None:
    """Downloads a file of a data set to `into`, and retries where that may help.

    Args:
        size, sha256: of the file; None if unknown: then `remote.manifest_megabytes` is the most that may come.

    Raises:
        Failure: it cannot be downloaded; `into` may then hold anything.
        UserError: nothing installed opens such a URL.
        OSError: the disk cannot be written.
    """
    url, attempt = address.of(name), 0
    most = int(settings.manifest_megabytes * 1e6) if size is None else size
    while True:
        attempt += 1
        try:
            if address.is_pipe:
                _by_command(url, into, settings, most)
            elif url.startswith(("http://", "https://")):
                _by_http(url, into, settings, most)
            else:
                _by_fsspec(url, into, most)
            return _verify(into, size, sha256)
        except Failure as failure:
            limit = min(settings.retries, _RETRIES_OF_WRONG_BYTES) if failure.wrong else settings.retries
            if not failure.again or attempt > limit:
                raise
            backoff = _BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1)
            wait = min(LONGEST_WAIT, max(failure.wait, backoff))
            _log.warning("%s: %s; trying again in %.0f s", address.shown(name), failure, wait)
        time.sleep(wait)


def _by_http(url: str, into: Path, settings: RemoteConfig, most: int) -> None:
    deadline = Deadline(settings.deadline)
    try:
        with deadline, opener_with(deadline).open(request_of(url), timeout=settings.timeout) as response:
            _write(into, iter(lambda: response.read1(CHUNK), b""), most)
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


def _by_command(command: str, into: Path, settings: RemoteConfig, most: int) -> None:
    # Its own process group, so that a command that hangs is killed with all its children.
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        _write(into, _chunks_of(process.stdout.fileno(), settings), most)
        status = process.wait(settings.timeout)
    except subprocess.TimeoutExpired as error:
        raise Failure(f"the command did not end for {settings.timeout:g} s", again=True) from error
    finally:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        found = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise Failure(f"the command failed ({found})", again=status not in (126, 127))


def _chunks_of(descriptor: int, settings: RemoteConfig) -> Iterator[bytes]:
    poll = select.poll()  # select.select fails for descriptors above 1,023
    poll.register(descriptor, select.POLLIN)
    end = time.monotonic() + settings.deadline
    while True:
        if not poll.poll(settings.timeout * 1000):
            raise Failure(f"the command was silent for {settings.timeout:g} s", again=True)
        if time.monotonic() > end:
            raise Failure(f"the command was not done after remote.deadline={settings.deadline:g} s", again=True)
        if not (chunk := os.read(descriptor, CHUNK)):
            return
        yield chunk


def _by_fsspec(url: str, into: Path, most: int) -> None:
    import fsspec

    try:
        system, inside = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        shown = without_credentials(url)
        raise UserError(f"{shown} cannot be opened here: {without_credentials(str(error), url)}") from error
    try:
        if (found := system.size(inside) or 0) > most:
            raise Failure(_too_many(most, found), again=True, wrong=True)
        system.get_file(inside, str(into))
    except Failure:
        raise
    except FileNotFoundError as error:
        raise Failure("there is no such file", missing=True) from error
    except PermissionError as error:
        raise Failure(f"access was refused ({without_credentials(str(error), url)})") from error
    except Exception as error:  # each backend has its own exceptions
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        system.invalidate_cache()
        raise Failure(without_credentials(f"{type(error).__name__}: {error}", url), again=True) from error


def _write(into: Path, chunks: Iterable[bytes], most: int) -> None:
    """Writes the chunks, but at most one chunk beyond `most` bytes: a stream may be endless."""
    written = 0
    with into.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            written += len(chunk)
            if written > most:
                raise Failure(_too_many(most, written), again=True, wrong=True)


def _too_many(most: int, came: int) -> str:
    return (
        f"more than the {most} bytes came that are expected ({came} so far); for a manifest "
        "remote.manifest_megabytes is the limit"
    )


def _verify(path: Path, size: int | None, sha256: str | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise Failure(f"{found} bytes came, the manifest says {size}", again=True)
    if sha256 is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Failure("the bytes that came are not those of the manifest's sha256", again=True, wrong=True)
