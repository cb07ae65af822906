"""Downloads one file of a data set from a URL or a command, with retries.

HTTP uses the standard library, other schemes fsspec (s3fs, gcsfs, … must be installed), and `pipe:` runs a shell
command. Credentials in a URL are used and never shown.

`requests` would save 15 of the 46 lines that speak HTTP here. But it trusts certifi's certificates instead of the
system's and SSL_CERT_FILE, and urllib3's `Retry` ends when the response's headers have arrived: the loop in `fetch`,
which also covers a cut body, a wrong size and a wrong checksum, would stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from stage_trainer.data.http import FULL, Failure, request_of, response_to
from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import Address, without_credentials

_T = TypeVar("_T")

CHUNK = 1 << 20
"""Bytes per read."""
LONGEST_WAIT = 60.0
"""The longest wait between two attempts, in seconds, even if Retry-After asks for more: other ranks wait as well."""
_BACKOFF = 1.0  # seconds before the second attempt; doubled for each further one
_RETRIES_OF_WRONG_BYTES = 2  # more attempts rarely turn wrong bytes into right ones
_log = logging.getLogger(__name__)


def check_command(base: str, settings: RemoteConfig) -> None:
    """UserError for a command that the recipe does not allow, or that lacks the {name} of the file."""
    if not base.startswith("pipe:"):
        return
    if not settings.allow_pipe:
        raise UserError(
            "the recipe has data behind pipe:, which runs a shell command; if you trust it, set remote.allow_pipe=true"
        )
    if settings.ranges == "always":
        raise UserError("remote.ranges is 'always', and a pipe: prints whole files; leave it out")
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
    url = address.of(name)
    most = int(settings.manifest_megabytes * 1e6) if size is None else size

    def once() -> None:
        if address.is_pipe:
            _by_command(url, into, settings, most)
        elif url.startswith(("http://", "https://")):
            _by_http(url, into, settings, most)
        else:
            _by_fsspec(url, into, most)
        _verify(into, size, sha256)

    repeated(once, address.shown(name), settings.retries)


def repeated(once: Callable[[], _T], shown: str, retries: int) -> _T:
    """What `once` gives; it is called again after a `Failure` that another attempt may help.

    Args:
        shown: what is downloaded, without credentials.

    Raises:
        Failure: the last one.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return once()
        except Failure as failure:
            limit = min(retries, _RETRIES_OF_WRONG_BYTES) if failure.wrong else retries
            if not failure.again or attempt > limit:
                raise
            backoff = _BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1)
            wait = min(LONGEST_WAIT, max(failure.wait, backoff))
            _log.warning("%s: %s; trying again in %.0f s", shown, failure, wait)
        time.sleep(wait)


def _by_http(url: str, into: Path, settings: RemoteConfig, most: int) -> None:
    with response_to(request_of(url), url, settings) as response:
        _write(into, iter(lambda: response.read1(CHUNK), b""), most)


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
    with opened_by_fsspec(url) as (system, inside):
        if (found := system.size(inside) or 0) > most:
            raise Failure(_too_many(most, found), again=True, wrong=True)
        system.get_file(inside, str(into))


@contextlib.contextmanager
def opened_by_fsspec(url: str) -> Iterator[tuple[Any, str]]:
    """(fsspec's file system, the path in it) of a URL; what goes wrong meanwhile is a `Failure`.

    Raises:
        UserError: nothing installed opens such a URL.
    """
    import fsspec

    try:
        system, inside = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        shown = without_credentials(url)
        raise UserError(f"{shown} cannot be opened here: {without_credentials(str(error), url)}") from error
    try:
        yield system, inside
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
