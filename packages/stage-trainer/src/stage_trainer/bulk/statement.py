"""What a file of vectors says of them: without it int8 vectors could not be compared with anything."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stage_trainer.errors import UserError
from stage_trainer.metrics.quantization import SCALARS, check_precision, checked_ranges

FORMAT = "trilith-vectors/1"
KEY = b"trilith"
"""Under which a parquet file's metadata have it; beside a .npy it is a file."""


@dataclass(frozen=True)
class Statement:
    """How vectors were made and are stored.

    Args:
        model: sha256 of its files.
        dims: of the vectors, which bits have an eighth as many bytes of.
        normalize: whether they were at length one.
        task: of the texts; images have none.
        ranges: of int8 and uint8, the minima and maxima of the dims; None of the others.
    """

    model: str
    dims: int
    precision: str = "float32"
    normalize: bool = True
    task: str | None = None
    ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def content(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def text(self) -> str:
        return json.dumps(self.content(), ensure_ascii=False)

    @classmethod
    def read(cls, text: str | bytes, where: Path) -> Statement:
        """Raises UserError if it is none, or damaged."""
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            ranges = content.pop("ranges", None)
            made = cls(**content, ranges=None if ranges is None else as_stated(ranges))
            if type(made.dims) is not int or made.dims < 1 or not isinstance(made.model, str):
                raise ValueError("it has no dims, or no model")
            check_precision(made.precision, made.dims)
            if (made.precision in SCALARS) != (made.ranges is not None):
                raise ValueError(f"{made.precision} and ranges do not go together")
            if made.ranges is not None:
                checked_ranges(made.ranges, made.dims)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{where} does not say how its vectors are stored ({error}); encode them again") from error
        return made

    def differs(self, other: Statement) -> list[str]:
        """In what the vectors of two files cannot be searched together."""
        words = {"model": "model", "dims": "dims", "precision": "precision", "normalize": "--no-normalize",
                 "ranges": "ranges"}  # fmt: skip
        return [word for name, word in words.items() if getattr(self, name) != getattr(other, name)]


def as_stated(ranges: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ranges `[2, D]` as numbers that JSON gives back bit for bit."""
    low, high = np.asarray(ranges, dtype=np.float32).tolist()
    return tuple(low), tuple(high)
