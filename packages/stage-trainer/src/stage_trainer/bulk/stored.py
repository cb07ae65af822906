"""Reading files of vectors: their statement, and rows with ids, some thousands in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stage_trainer.bulk.statement import KEY, Statement
from stage_trainer.bulk.tables import failures, parquet_library
from stage_trainer.bulk.vectors import SUFFIXES, companions, vector_type
from stage_trainer.errors import UserError
from stage_trainer.metrics.quantization import BITS, DTYPES, SCALARS, checked_ranges, ranges_of, stored_width

_ROWS = 16384


class Block(NamedTuple):
    """Rows as they are stored, `[N, stored width]`, with their ids."""

    ids: list[str]
    codes: np.ndarray


class Stored:
    """A file of vectors that `stage-trainer encode` wrote.

    Attributes:
        statement: what it says of them.
        count: how many there are.

    Raises:
        UserError: it is none, or damaged; so may reading it.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.suffix not in SUFFIXES or not path.is_file():
            raise UserError(f"{path} is no file of vectors; expected one that `stage-trainer encode` wrote")
        self.statement, self.count = self._npy() if path.suffix == ".npy" else self._parquet()

    def blocks(self) -> Iterator[Block]:
        yield from self._of_npy() if self.path.suffix == ".npy" else self._of_parquet()

    def _npy(self) -> tuple[Statement, int]:
        beside = companions(self.path).statement
        try:
            text = beside.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.path}: {beside.name}, which says how the vectors are stored, cannot be read beside it "
                f"({error.strerror or error}); encode them again"
            ) from error
        statement = Statement.read(text, beside)
        rows = self._rows()
        wanted = stored_width(statement.precision, statement.dims)
        if rows.ndim != 2 or rows.shape[1] != wanted or rows.dtype != DTYPES[statement.precision]:
            raise UserError(
                f"{self.path} holds {rows.dtype} {list(rows.shape)}, and {beside.name} says {statement.precision} of "
                f"{statement.dims} dims, [N, {wanted}]: they do not belong together; encode the vectors again"
            )
        return statement, len(rows)

    def _rows(self) -> np.ndarray:
        try:
            found: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path} cannot be read ({error}); encode the vectors again") from error
        return found

    def _of_npy(self) -> Iterator[Block]:
        rows, ids = self._rows(), companions(self.path).ids
        assert ids is not None
        first = 0
        try:
            with ids.open(encoding="utf-8") as lines:
                for first in range(0, self.count, _ROWS):
                    codes = np.asarray(rows[first : first + _ROWS])
                    yield Block([str(json.loads(next(lines))) for _ in range(len(codes))], codes)
                if next(lines, None) is not None:
                    raise ValueError("there are more ids than vectors")
        except (OSError, ValueError, StopIteration, RuntimeError) as error:
            raise UserError(f"{ids} does not name the {self.count:,} vectors of {self.path} ({error!r})") from error

    def _parquet(self) -> tuple[Statement, int]:
        library = parquet_library()
        try:
            with library.ParquetFile(self.path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except failures() as error:
            raise UserError(f"{self.path} is no parquet file ({error})") from error
        text = (schema.metadata or {}).get(KEY)
        if text is None or {"id", "vector"} - set(schema.names):
            raise UserError(
                f"{self.path} does not say how its vectors are stored; expected what `stage-trainer encode` writes: "
                f"the columns id and vector, and {KEY.decode()!r} in its metadata"
            )
        statement = Statement.read(text, self.path)
        column, wanted = schema.field("vector").type, vector_type(statement)
        found = getattr(column, "value_type", None), getattr(column, "list_size", None)  # the item's name may differ
        if found != (wanted.value_type, wanted.list_size):
            raise UserError(
                f"{self.path}: its vectors are {column}, and it says {statement.precision} of {statement.dims} dims, "
                f"{wanted}; encode them again"
            )
        return statement, int(rows)

    def _of_parquet(self) -> Iterator[Block]:
        width = stored_width(self.statement.precision, self.statement.dims)
        try:
            with parquet_library().ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROWS, columns=["id", "vector"], use_threads=False):
                    codes = batch.column("vector").flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
                    yield Block([str(name) for name in batch.column("id").to_pylist()], codes)
        except failures() as error:
            raise UserError(f"{self.path} is damaged ({error}); encode the vectors again") from error


def open_together(paths: Sequence[Path]) -> list[Stored]:
    """Files of vectors that can be searched as one.

    Raises:
        UserError: one cannot be read, or their models, dims, precisions or ranges differ.
    """
    files = [Stored(path) for path in paths]
    for file in files[1:]:
        if different := files[0].statement.differs(file.statement):
            raise UserError(
                f"{files[0].path} and {file.path} differ in {', '.join(different)} ({_short(files[0].statement)}; "
                f"{_short(file.statement)}), so their numbers do not mean the same; encode them with the same model "
                "and options, int8 and uint8 with --calibration and the same file"
            )
    return files


def ranges_in(file: Stored, asked: Statement) -> np.ndarray:
    """The ranges that a file of vectors gives others: of int8 and uint8 those that it has, of floats those of its rows.

    Args:
        asked: how the others are made.

    Raises:
        UserError: it cannot be read, has no ranges, or its vectors were made differently.
    """
    path, stated = file.path, file.statement
    different = [word for word in asked.differs(stated) if word not in ("precision", "ranges")]
    if different:
        raise UserError(
            f"--calibration {path} differs from what is encoded in {', '.join(different)} ({_short(stated)}; "
            f"{_short(asked)}); give vectors of the same model and options"
        )
    if stated.ranges is not None:
        return checked_ranges(stated.ranges)
    if stated.precision in BITS:
        raise UserError(
            f"--calibration {path} holds {stated.precision}, bits without ranges; give floats, int8 or uint8"
        )
    try:
        return ranges_of_blocks(block.codes for block in file.blocks())
    except UserError as error:
        raise UserError(f"--calibration {path}: {error}") from error


def ranges_of_blocks(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """`ranges_of` all rows of some blocks `[N, D]`."""
    count, extremes = 0, np.empty((0, 1), np.float32)
    for rows in blocks:
        if len(rows):
            extremes = np.vstack((*(extremes if count else ()), rows.min(axis=0), rows.max(axis=0)))
            extremes, count = np.vstack((extremes.min(axis=0), extremes.max(axis=0))), count + len(rows)
    return ranges_of(extremes[:count])  # one vector alone has no range


def _short(statement: Statement) -> str:
    ranges = ""
    if statement.precision in SCALARS and statement.ranges is not None:
        ranges = f", ranges from {min(statement.ranges[0]):.3g} to {max(statement.ranges[1]):.3g}"
    return f"{statement.precision} of {statement.dims} dims{ranges}, model {statement.model[:8]}"
