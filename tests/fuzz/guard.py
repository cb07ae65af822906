"""What a reader of foreign data must not do: write elsewhere, start programs, unpickle, call other servers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


class Forbidden(BaseException):
    """Raised where a call does what no reader of data may do, or takes too long; no `except Exception` hides it."""


class Guard:
    """Watches what a call does through Python's audit events."""

    def __init__(self) -> None:
        self.crimes: list[str] = []
        self.port = 0  # of the case's own server
        self._folder = ""
        self._events: dict[str, Callable[[tuple[Any, ...]], str]] = {
            "open": self._open,
            **{event: partial(self._written, event) for event in _CHANGES},
            **{event: partial(self._program, event) for event in _PROGRAMS},
            "pickle.find_class": lambda arguments: f"unpickles {arguments[0]}.{arguments[1]}",
            "socket.connect": self._connect,
        }

    def begin(self, folder: Path) -> None:
        self._folder = f"{os.path.realpath(folder)}{os.sep}"

    def end(self) -> None:
        self._folder = ""

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._folder and event in self._events:
            with contextlib.suppress(UnicodeError, ValueError):  # a name that no path can have is refused by the call
                if crime := self._events[event](arguments):
                    self.crimes.append(crime)
                    raise Forbidden(crime)

    def _open(self, arguments: tuple[Any, ...]) -> str:
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return self._written("open", (path,)) if writes else ""

    def _written(self, event: str, arguments: tuple[Any, ...]) -> str:
        for path in arguments:
            if not isinstance(path, str | bytes | os.PathLike) or os.fsdecode(path) in ("/dev/null", ""):
                continue
            if not f"{os.path.realpath(os.fsdecode(path))}{os.sep}".startswith(self._folder):
                return f"writes outside of its folder ({event})"
        return ""

    def _program(self, event: str, arguments: tuple[Any, ...]) -> str:
        return f"starts a program ({event} {arguments[0]!r:.80})"

    def _connect(self, arguments: tuple[Any, ...]) -> str:
        address = arguments[1]
        own = isinstance(address, tuple) and address[:2] == ("127.0.0.1", SERVER_PORT[0])
        return "" if own else "connects to another server"


SERVER_PORT = [0]
"""The port of the server of the case that is running; `remote` sets it."""

_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
