"""Signatures of any number of texts, on the disk: a decision over all of them loads one band at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.curation.minhash import BANDS, PERMUTATIONS, Signatures
from data_prep.curation.passes import load
from data_prep.errors import UserError


def arrays_of(name: str, signed: Signatures) -> dict[str, np.ndarray]:
    """The arrays that a unit of the survey saves for a `SignatureStore` of this name."""
    bands = {f"{name}_band_{number}": signed.band(number) for number in range(BANDS)}
    return {f"{name}_low": signed.low, **bands}


class SignatureStore:
    """The signatures that units of a survey saved, joined in the units' order; close it after use.

    The low bytes are collected in one temporary file beside those of the survey, which disappears with this process.

    Raises:
        UserError: the disk refuses.
    """

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self._files, self._name = files, name
        self._count = 0
        folder = files[0].parent
        try:
            self._low: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
            for file in files:
                low = load(file, f"{name}_low")[f"{name}_low"]
                self._low.write(low.tobytes())
                self._count += len(low)
            self._low.flush()
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror or error}); free some space and run again"
            ) from error

    def __enter__(self) -> SignatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._low.close()

    def __len__(self) -> int:
        return self._count

    def band(self, number: int) -> np.ndarray:
        """Each text's hash of a group of minima, `[N]` uint64."""
        name, hashes, place = f"{self._name}_band_{number}", np.empty(self._count, np.uint64), 0
        for file in self._files:
            part = load(file, name)[name]
            hashes[place : place + len(part)] = part
            place += len(part)
        return hashes

    def low_of(self, texts: np.ndarray) -> np.ndarray:
        """The low bytes of the minima of some texts, `[M, PERMUTATIONS]` uint8."""
        rows = (os.pread(self._low.fileno(), PERMUTATIONS, PERMUTATIONS * text) for text in texts.tolist())
        return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, PERMUTATIONS)
