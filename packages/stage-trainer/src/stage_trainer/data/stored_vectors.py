"""Vectors of a data set's samples on the disk, made once by a model that does not train: `[samples, V, D]` float32.

    FOLDER/NAME-DIGEST/origin.json      what they are of, and by which model
    FOLDER/NAME-DIGEST/maker.json       a teacher's weights and settings, which `origin` does not say
    FOLDER/NAME-DIGEST/000000.npy       those of the data set's shard 0, to be mapped into memory
    FOLDER/NAME-DIGEST/000000.json      its sidecar: sha256; the samples that have none, each with the reason; and which
                                        vectors are of texts that were cut

The digest is of everything in origin.json: vectors of other weights, data or settings are in another folder. A shard's
sidecar is written after its vectors, and both appear whole or not at all: what is there is finished, and work that was
interrupted goes on with the next shard.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from data_prep.shards import Dataset, write_file

from stage_trainer.errors import UserError
from stage_trainer.files import read_json, sha256, writing

FORMAT = "trilith-vectors/1"


class StoredVectors:
    """The vectors of one data set.

    Args:
        folder: of all of them; made when it is first written to.
        data: the data set.
        origin: what determines the vectors beside the data, as JSON holds it.

    Attributes:
        directory: where these are.
    """

    def __init__(self, folder: Path, data: Dataset, origin: Mapping[str, object]):
        self.data = data
        about = {"format": FORMAT, "data": f"{data.kind}/{data.source}", "fingerprint": data.fingerprint, **origin}
        self._about = json.dumps(about, indent=2, sort_keys=True)
        digest = hashlib.sha256(self._about.encode()).hexdigest()[:16]
        self.directory = folder / f"{data.kind}-{data.source}-{digest}"
        self._open: dict[int, tuple[np.ndarray, dict[int, str], dict[int, list[int]]]] = {}

    def missing(self) -> list[int]:
        """The shards without vectors."""
        return [n for n in range(len(self.data.shard_sizes)) if not self._sidecar(n).exists()]

    def damaged(self, shard: int) -> bool:
        """Whether a shard's vectors are not those that were written."""
        try:
            return sha256(self._array(shard)) != read_json(self._sidecar(shard)).get("sha256")
        except (OSError, ValueError):
            return True

    @property
    def maker(self) -> dict[str, Any]:
        """Who made the vectors, as far as `origin` does not say it; empty if it is not known.

        Raises:
            UserError: the file that says it is damaged.
        """
        file = self.directory / "maker.json"
        if not file.exists():
            return {}
        try:
            return read_json(file)
        except ValueError as error:
            raise UserError(f"{file} cannot be read ({error}); remove {self.directory}, and it is made anew") from error

    def check_maker(self, maker: Mapping[str, object]) -> None:
        """UserError if somebody else made the vectors that there are."""
        found = self.maker
        if found != maker and (found or len(self.missing()) < len(self.data.shard_sizes)):
            raise UserError(
                f"{self.directory} was made by other weights or settings ({_said(found)}; now {_said(maker)}); remove "
                "it and run `stage-trainer embed` again, or name another folder"
            )

    def note_maker(self, maker: Mapping[str, object]) -> None:
        """Notes who makes the vectors; errors as `check_maker`."""
        self.check_maker(maker)
        file = self.directory / "maker.json"
        with writing(file):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_file(file, _said(maker).encode())

    def write(
        self,
        shard: int,
        vectors: np.ndarray,
        unusable: Mapping[int, str],
        cut: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """Adds a shard.

        Args:
            vectors: float32 `[n, V, D]`, rows of zeros where there is none.
            unusable: {place in the shard: why there is none}.
            cut: {place in the shard: which of its V are of texts of which the end was cut off}.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_file(self.directory / "origin.json", self._about.encode())
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(vectors, dtype=np.float32))
            raw = content.getvalue()
            write_file(self._array(shard), raw)
            about = {
                "sha256": hashlib.sha256(raw).hexdigest(),
                "unusable": {str(place): reason for place, reason in unusable.items()},
                "cut": {str(place): list(which) for place, which in cut.items()},
            }
            write_file(self._sidecar(shard), json.dumps(about).encode())
        self._open.pop(shard, None)

    def of(self, index: int) -> torch.Tensor | str:
        """Sample `index`'s vectors, float32 `[V, D]`, or why it has none.

        Raises:
            UserError: its shard is not there, or cannot be read.
        """
        (vectors, unusable, _), place = self._place(index)
        return unusable[place] if place in unusable else torch.from_numpy(vectors[place].copy())

    def cut(self, index: int) -> list[int]:
        """Which of sample `index`'s vectors are of texts of which the end was cut off; errors as `of`."""
        (_, _, cut), place = self._place(index)
        return cut.get(place, [])

    @property
    def width(self) -> int:
        """D."""
        return int(self._read(0)[0].shape[2])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # a worker process maps its own

    def _place(self, index: int) -> tuple[tuple[np.ndarray, dict[int, str], dict[int, list[int]]], int]:
        """(what `_read` gives of the sample's shard, its place there)"""
        shard = self.data.shard_of(index)
        if shard not in self._open:
            self._open[shard] = self._read(shard)
        return self._open[shard], index - self.data.samples_of(shard).start

    def _read(self, shard: int) -> tuple[np.ndarray, dict[int, str], dict[int, list[int]]]:
        array, expected = self._array(shard), self.data.shard_sizes[shard]
        try:
            vectors = np.load(array, mmap_mode="r", allow_pickle=False)
            about = read_json(self._sidecar(shard))
            unusable = {int(place): str(why) for place, why in about["unusable"].items()}
            cut = {int(place): [int(one) for one in which] for place, which in about.get("cut", {}).items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{array} cannot be read ({error}); remove {self.directory}, and it is made anew"
            ) from error
        if vectors.dtype != np.float32 or vectors.ndim != 3 or len(vectors) != expected:
            raise UserError(
                f"{array} holds {vectors.dtype} {list(vectors.shape)}; expected float32 [{expected}, views, width]: "
                f"remove {self.directory}, and it is made anew"
            )
        return vectors, unusable, cut

    def _array(self, shard: int) -> Path:
        return self.directory / f"{shard:06}.npy"

    def _sidecar(self, shard: int) -> Path:
        return self.directory / f"{shard:06}.json"


def _said(maker: Mapping[str, object]) -> str:
    return json.dumps(maker, sort_keys=True) if maker else "nobody knows whose"


def digest_of(weights: Mapping[str, torch.Tensor], settings: Mapping[str, object]) -> str:
    """sha256 of a model's weights, by name, and of the settings that they compute with."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
