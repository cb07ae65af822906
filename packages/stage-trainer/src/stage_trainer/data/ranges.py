"""A remote file from its first byte to its last, by ranges: only what is being read and what comes next is kept."""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, overload

from stage_trainer.data.download import CHUNK, opened_by_fsspec, repeated
from stage_trainer.data.http import FULL, Failure, request_of, response_to
from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import without_credentials

SPAN = 4 * 2**20
"""Bytes of a range. Each file that is open has two in memory, the one that is read and the next."""

_CONTENT_RANGE = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+)")


class NoRanges(Failure):
    """The server sends whole files alone."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file from `start` on, its size in bytes, and the server's mark of this version of it."""

    start: int
    content: bytes
    total: int
    version: str | None


class RangedFile(io.RawIOBase):
    """A remote file, to be read once, from the start to the end.

    Of a server that knows no ranges the file comes whole, into an unnamed file in `remote.cache`.

    Args:
        url: of http, https or what fsspec opens; credentials in it are not shown.
        settings: how it is fetched.
        pool: fetches what comes next.
        count: is told how many bytes came, each time.

    Raises:
        Failure: while it is opened or read: it cannot be fetched, or changed meanwhile.
        UserError: nothing installed opens such a URL, or the cache cannot be written.
    """

    def __init__(self, url: str, settings: RemoteConfig, pool: ThreadPoolExecutor, count: Callable[[int], None]):
        self.url, self.settings, self.pool, self.count = url, settings, pool, count
        self._whole: IO[bytes] | None = None
        self._next: Future[Span] | None = None
        found = self._fetch(0)
        if isinstance(found, Span):
            self._whose = found.total, found.version
            self._take(found)
        else:
            self._whole = found

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As `io.RawIOBase.readinto`; waits for the next range where one is read."""
        if self._whole is not None:
            given = self._whole.read(len(buffer))
            buffer[: len(given)] = given
            return len(given)
        if self._at == len(self._span.content) and self._next is not None:
            self._take(self._next.result())
        given = self._span.content[self._at : self._at + len(buffer)]
        buffer[: len(given)] = given
        self._at += len(given)
        return len(given)

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()
        if self._next is not None:
            self._next.cancel()
        super().close()

    def _take(self, span: Span) -> None:
        """Begins to read a range, and to fetch the one after it."""
        if (span.total, span.version) != self._whose:
            raise Failure("the file changed while it was read")
        self._span, self._at = span, 0
        self.count(len(span.content))
        stop = span.start + len(span.content)
        self._next = self.pool.submit(self._fetch_span, stop) if stop < span.total else None

    def _fetch_span(self, start: int) -> Span:
        found = self._fetch(start)
        if not isinstance(found, Span):
            found.close()
            raise Failure("the server no longer sends ranges")
        return found

    def _fetch(self, start: int) -> Span | IO[bytes]:
        return fetch_span(self.url, start, SPAN, self.settings, self._all_of)

    def _all_of(self, response: http.client.HTTPResponse) -> IO[bytes]:
        """The whole file, in an unnamed one."""
        folder = Path(self.settings.cache).expanduser()
        with contextlib.ExitStack() as on_failure:
            came = 0
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file: IO[bytes] = on_failure.enter_context(tempfile.TemporaryFile(dir=folder))
                while chunk := response.read1(CHUNK):
                    came += file.write(chunk)
            except OSError as error:
                if error.errno not in (*FULL, errno.EACCES, errno.EROFS, errno.ENOTDIR):
                    raise
                raise UserError(
                    f"{without_credentials(self.url)} has to be kept whole, since its server sends no ranges, and "
                    f"remote.cache, {folder}, cannot be written ({error.strerror}); free some space, or name another"
                ) from error
            length = response.headers.get("Content-Length")
            if length is not None and came != int(length):
                raise Failure(f"{came} bytes came of {length}", again=True)
            on_failure.pop_all()
        file.seek(0)
        self.count(came)
        return file


Whole = Callable[[http.client.HTTPResponse], IO[bytes]]


@overload
def fetch_span(url: str, start: int, size: int, settings: RemoteConfig) -> Span: ...
@overload
def fetch_span(url: str, start: int, size: int, settings: RemoteConfig, whole: Whole) -> Span | IO[bytes]: ...
def fetch_span(url: str, start: int, size: int, settings: RemoteConfig, whole: Whole | None = None) -> Span | IO[bytes]:
    """Up to `size` bytes of a remote file from `start` on; fewer at its end.

    Args:
        whole: reads the answer of a server that sends the whole file instead.

    Raises:
        Failure: they cannot be fetched; `NoRanges` where the server sends the whole file, and `whole` is missing.
        UserError: nothing installed opens such a URL.
    """

    def by_http() -> Span | IO[bytes]:
        request = request_of(url)
        request.add_header("Range", f"bytes={start}-{start + size - 1}")
        try:
            with response_to(request, url, settings) as response:
                return answered(response)
        except Failure as failure:
            if start == 0 and getattr(failure.__cause__, "code", None) == 416:
                return Span(0, b"", 0, None)  # of an empty file every range lies beyond its end
            raise

    def answered(response: http.client.HTTPResponse) -> Span | IO[bytes]:
        if response.status != 206:
            if whole is None:
                raise NoRanges("the server sends no ranges of a file")
            return whole(response)
        said = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if said is None or int(said["first"]) != start:
            raise Failure(f"the server answered with another range, {response.headers.get('Content-Range')!r}")
        content = response.read(size + 1)
        if len(content) != min(size, int(said["total"]) - start):
            raise Failure(f"{len(content)} bytes came of the range {said[0]!r}", again=True)
        return Span(start, content, int(said["total"]), response.headers.get("ETag"))

    def by_fsspec() -> Span:
        with opened_by_fsspec(url) as (system, inside):
            total = int(system.size(inside) or 0)
            content = bytes(system.cat_file(inside, start=start, end=min(start + size, total)))
            if len(content) != min(size, total - start):
                raise Failure(f"{len(content)} bytes came from byte {start} on, of {total}", again=True)
            return Span(start, content, total, None)

    once: Callable[[], Span | IO[bytes]] = by_http if url.startswith(("http://", "https://")) else by_fsspec
    return repeated(once, without_credentials(url), settings.retries)
