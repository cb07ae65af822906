"""The list of everything that a job left out: `dropped.jsonl` beside its data sets, a line of JSON for each.

A line is `{"source", "where", "reason"}`: the file or data set that was read, the row, line or member, and why; with
`count` where it stands for several (the rest of a damaged file), and `excerpt`, the beginning of its texts. Each unit
writes a list of its own, and the job puts them together in the order of the units, so that neither the engine nor a
stop changes a byte, and nothing is held in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from data_prep.shards.files import replacing, temporary, writing

NAME = "dropped.jsonl"
_EXCERPT = 120  # characters
_URL = re.compile(r"(\w+://)\S*")  # an address may hold a password or a key
_encode = json.JSONEncoder(ensure_ascii=False).encode


class DroppedList:
    """The list of one unit, at `path`; it appears at `finish`, if anything was added. `source`: what the unit reads."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source
        self._temporary: Path | None = None
        self._file: IO[bytes] | None = None

    def add(self, reason: str, where: str, count: int = 1, content: Any = None, source: str = "") -> None:
        """Append what was left out. content: what stood there; of it texts alone come into the list.

        Raises:
            ShardError: the disk refuses.
        """
        line = {"source": source or self._source, "where": where, "reason": reason}
        more = {"count": count} if count != 1 else {}
        text = excerpt(content)
        raw = _encode({**line, **more, **({"excerpt": text} if text else {})}) + "\n"
        with writing(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._temporary = temporary(self._path)
                self._file = self._temporary.open("wb")
            self._file.write(raw.encode("utf-8", "backslashreplace"))

    def finish(self) -> int:
        """Flush the list and give it its name; returns its bytes, 0 without one. ShardError if the disk refuses."""
        if self._file is None or self._temporary is None:
            return 0
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
            self._temporary.rename(self._path)
        self._file = None
        return size

    def abandon(self) -> None:
        """Remove the unfinished list."""
        if self._file is not None and self._temporary is not None:
            for remove in (self._file.close, self._temporary.unlink):
                with contextlib.suppress(OSError):  # on a full disk the buffer cannot be flushed
                    remove()


def put_together(lists: Iterable[Path], path: Path) -> None:
    """The lists of the units, in this order, as one file; no file if there is none. ShardError if the disk refuses."""
    there = [one for one in lists if one.exists()]
    if not there:
        return
    with writing(path), replacing(path) as file:
        for one in there:
            with one.open("rb") as part:
                shutil.copyfileobj(part, file)


def excerpt(content: Any) -> str:
    """The beginning of the texts in a row: one line that steers no terminal, without the rest of addresses."""
    text, length = [], 0
    for part in _texts(content):
        text.append(part[: 4 * _EXCERPT])
        length += len(part)
        if length > _EXCERPT:
            break
    line = " ".join(_URL.sub(r"\1…", " | ".join(text)).split())
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in line)
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]}…"


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, bytes):
        yield content[: 4 * _EXCERPT].decode("utf-8", "replace")
    elif isinstance(content, dict | list | tuple):
        for each in content.values() if isinstance(content, dict) else content:
            if not isinstance(each, bytes):  # images
                yield from _texts(each)
