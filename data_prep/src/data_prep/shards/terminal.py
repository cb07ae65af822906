"""What commands print: foreign names and texts must not steer the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO, cast

STDOUT, STDERR = "standard output", "standard error"
# C0 without tab and line feed, delete, and C1: they move the cursor, set the title, or start such a sequence.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class _Escaping:
    """A stream that writes control characters as \\xNN. A leading carriage return passes: progress bars redraw so.

    Errors name the stream as their file, since a full disk or a closed pipe says itself not where it is.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        kept = "\r" if text.startswith("\r") else ""
        with self._named():
            return self._stream.write(kept + text.removeprefix("\r").translate(_ESCAPED))

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from error

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Everything printed meanwhile, on stdout and stderr, has its control characters escaped."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, _Escaping(stream, name)) for stream, name in zip(streams, (STDOUT, STDERR), strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
