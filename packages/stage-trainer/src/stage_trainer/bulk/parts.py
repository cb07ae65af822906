"""Finished parts of a job, each a file that is whole or not there; what a job that was killed goes on from.

A part's name is a digest of everything that its vectors follow from: the model, the options, and the texts and images
themselves. So a part that is there is right, whatever happened since, and what changed is encoded again.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data_prep.shards import write_file

from stage_trainer.bulk.entries import Entry
from stage_trainer.files import writing


class LeftOut(NamedTuple):
    """An entry without a vector: its place in the part, its id, its name, and why."""

    place: int
    id: str
    name: str
    reason: str


class Part(NamedTuple):
    """Vectors `[N, D]` float32 with the ids of those that have one, in order, and the entries that have none."""

    vectors: np.ndarray
    ids: list[str]
    left_out: list[LeftOut]

    @property
    def entries(self) -> int:
        return len(self.ids) + len(self.left_out)


def digest_of(key: str, entries: Sequence[Entry]) -> str:
    """The name of a part.

    Args:
        key: of the model and the options.
    """
    found = hashlib.sha256(key.encode())
    for entry in entries:
        value = entry.value if isinstance(entry.value, bytes) else repr(entry.value).encode("utf-8", "surrogatepass")
        fields = (entry.id, entry.kind, hashlib.sha256(value).hexdigest(), entry.fault, entry.stamp)
        found.update(json.dumps(fields).encode())
    return found.hexdigest()[:40]


class Parts:
    """The folder of the parts, beside the file that is made of them."""

    def __init__(self, out: Path):
        self.folder = out.with_name(f".{out.name}.parts")

    def write(self, name: str, part: Part) -> None:
        """Raises UserError if the disk is full."""
        content = io.BytesIO()
        rest = json.dumps({"ids": part.ids, "left_out": part.left_out}).encode()
        np.savez(content, vectors=part.vectors, rest=np.frombuffer(rest, np.uint8))
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self._path(name), content.getvalue())

    def read(self, name: str) -> Part | None:
        """The part; None if it is not there, or is damaged (its file has checksums)."""
        try:
            with np.load(self._path(name), allow_pickle=False) as found:
                vectors, rest = found["vectors"], json.loads(found["rest"].tobytes())
            return Part(vectors, rest["ids"], [LeftOut(*each) for each in rest["left_out"]])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def others(self, names: set[str]) -> int:
        """How many parts there are beside these: of other inputs, options or another model."""
        return len({path.stem for path in self.folder.glob("*.npz")} - names)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
