"""Vectors in fewer bits, to the same bytes as sentence-transformers' `quantize_embeddings` makes of the same numbers.

int8 and uint8 divide each dim's range into 256 steps; binary and ubinary keep each dim's sign, eight dims in a byte.
Refused is what sentence-transformers lets pass and nobody can search: numbers that are not finite, dims without a
range, bits that do not fill a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stage_trainer.errors import UserError

FLOATS, SCALARS, BITS = ("float32", "float16"), ("int8", "uint8"), ("binary", "ubinary")
PRECISIONS = (*FLOATS, *SCALARS, *BITS)
DTYPES = {
    "float32": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8, "binary": np.int8,
    "ubinary": np.uint8,
}  # fmt: skip
FEW = 100
"""Ranges of fewer vectors are a poor guess of others', as sentence-transformers says, too."""


def check_precision(precision: object, dims: int | None = None) -> None:
    """UserError unless vectors of so many dims can be stored like that."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if precision in BITS and dims is not None and dims % 8:
        raise UserError(
            f"precision {precision} puts eight dims into a byte, and vectors have {dims}; keep a multiple of eight of "
            "them (truncate_dim)"
        )


def stored_width(precision: str, dims: int) -> int:
    """The length of a stored row."""
    return dims // 8 if precision in BITS else dims


def stored_bytes(precision: str, dims: int) -> int:
    return stored_width(precision, dims) * np.dtype(DTYPES[precision]).itemsize


def ranges_of(embeddings: np.ndarray) -> np.ndarray:
    """float32 `[2, D]`: the smallest and the greatest number of each dim of calibration vectors `[N, D]`.

    Raises:
        UserError: they have no ranges: fewer than two vectors, a dim that is constant, numbers that are not finite.
    """
    rows = _floats(embeddings, "the calibration vectors")
    if len(rows) < 2:
        raise UserError(
            f"int8 and uint8 need the range of each dim, and {len(rows)} calibration "
            f"vector{' has' if len(rows) == 1 else 's have'} none; give calibration vectors or ranges, or take float16"
        )
    return checked_ranges(np.vstack((rows.min(axis=0), rows.max(axis=0))))


def checked_ranges(ranges: Any, dims: int | None = None) -> np.ndarray:
    """Ranges as float32 `[2, D]`.

    Raises:
        UserError: another shape, numbers that are not finite, or a dim that has no range.
    """
    found = np.asarray(ranges, dtype=np.float32)
    if found.ndim != 2 or len(found) != 2 or (dims is not None and found.shape[1] != dims):
        wanted = "D" if dims is None else dims
        raise UserError(f"ranges have the shape {list(found.shape)}; expected [2, {wanted}]: minima, then maxima")
    if not np.isfinite(found).all():
        raise UserError("ranges hold nan or inf; expected the smallest and the greatest number of each dim")
    if (flat := np.flatnonzero(found[1] <= found[0])).size:
        more = f" and {flat.size - 5:,} more" if flat.size > 5 else ""
        raise UserError(
            f"dims {', '.join(map(str, flat[:5]))}{more} have no range: the calibration vectors are constant there, so "
            "int8 and uint8 could not tell others apart by them. Calibrate on more vectors that differ, or take float16"
        )
    return found


def quantize_embeddings(
    embeddings: np.ndarray,
    precision: str,
    ranges: np.ndarray | None = None,
    calibration_embeddings: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors `[N, D]` as they are stored: `[N, D]`, or `[N, D / 8]` of binary and ubinary.

    Args:
        precision: one of `PRECISIONS`: float16 is ours, the others are sentence-transformers'.
        ranges: of int8 and uint8, `[2, D]`: minima, then maxima. What is outside gets the nearest step.
        calibration_embeddings: whose ranges are taken if none are given, `[M, D]`; None for the embeddings themselves.

    Raises:
        UserError: an unknown precision, numbers that are not finite or too large for float16, dims that do not fill a
            byte, or what `ranges_of` and `checked_ranges` refuse.
    """
    rows = _floats(embeddings, "the embeddings")
    check_precision(precision, rows.shape[-1])
    if precision in SCALARS:
        if ranges is None and not len(rows) and calibration_embeddings is None:
            return np.empty(rows.shape, DTYPES[precision])
        if ranges is None:
            ranges = ranges_of(np.atleast_2d(rows) if calibration_embeddings is None else calibration_embeddings)
        starts, steps = _starts_and_steps(checked_ranges(ranges, rows.shape[-1]))
        codes: np.ndarray = np.clip(np.floor((rows - starts) / steps), 0, 255)
        return (codes - 128).astype(np.int8) if precision == "int8" else codes.astype(np.uint8)
    if precision in BITS:
        bits = np.packbits(rows > 0, axis=-1)
        return (bits ^ 0x80).view(np.int8) if precision == "binary" else bits
    with np.errstate(over="ignore"):
        found: np.ndarray = rows.astype(DTYPES[precision])
    if not np.isfinite(found).all():
        raise UserError(f"numbers up to {np.abs(rows).max():.3g} are too large for float16; normalize the vectors")
    return found


def restored(codes: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """float32 `[N, D]` of stored rows: of int8 and uint8 the middle of each step, of bits ±1 / √D, at length one."""
    if precision in SCALARS:
        starts, steps = _starts_and_steps(checked_ranges(ranges, codes.shape[-1]))
        whole = codes.astype(np.float32) + (128.5 if precision == "int8" else 0.5)
        middles: np.ndarray = whole * steps + starts
        return middles
    if precision in BITS:
        packed = codes.view(np.uint8)
        bits = np.unpackbits(packed ^ np.uint8(0x80) if precision == "binary" else packed, axis=-1)
        units: np.ndarray = (2 * bits.astype(np.float32) - 1) / np.float32(np.sqrt(bits.shape[-1]))
        return units
    found: np.ndarray = codes.astype(np.float32)
    return found


def _starts_and_steps(ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ranges[0], (ranges[1] - ranges[0]) / 255


def _floats(rows: np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.dtype.kind != "f":
        raise UserError(
            f"{what} are of {rows.dtype}; expected floats: what is quantized already is not quantized again"
        )
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(np.atleast_2d(rows)).all(axis=1))
        raise UserError(f"{what} hold nan or inf, first in row {bad[0]}; encode what it is of again, in float32")
    return rows
