"""What commands print: foreign names and texts must not steer the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO, cast

# C0 without tab and line feed, delete, and C1: they move the cursor, set the title, or start such a sequence.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class _Escaping:
    """A stream that writes control characters as \\xNN. A leading carriage return passes: progress bars redraw so."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        kept = "\r" if text.startswith("\r") else ""
        return self._stream.write(kept + text.removeprefix("\r").translate(_ESCAPED))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Everything printed meanwhile, on stdout and stderr, has its control characters escaped."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Escaping(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
