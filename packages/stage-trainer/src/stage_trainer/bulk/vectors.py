"""The file of vectors with their ids, made of finished parts: it appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from data_prep.shards import sync

from stage_trainer.bulk.parts import Part
from stage_trainer.bulk.statement import KEY, Statement
from stage_trainer.bulk.tables import parquet_library
from stage_trainer.files import writing
from stage_trainer.metrics.quantization import DTYPES, quantize_embeddings, stored_width

SUFFIXES = (".parquet", ".npy")
_GROUP = 16384  # rows of a row group, and so those that a reader has in memory


class Companions(NamedTuple):
    """Files beside a file of vectors.

    Attributes:
        skipped: the list of what was left out.
        ids: of a .npy: a JSON text a line, in the order of its rows.
        statement: of a .npy; a parquet file has it in its metadata.
    """

    skipped: Path
    ids: Path | None
    statement: Path


def companions(out: Path) -> Companions:
    ids = out.with_suffix(".ids.jsonl") if out.suffix == ".npy" else None
    return Companions(out.with_suffix(".skipped.jsonl"), ids, out.with_suffix(".vectors.json"))


def write(
    out: Path, parts: Callable[[], Iterator[Part]], folder: Path, statement: Statement, *, skipping: bool
) -> tuple[int, int]:
    """Writes the file, after those that belong to it: as long as it is not there, nothing looks finished.

    Args:
        parts: gives the parts in order, from the first one each time that it is called.
        folder: on the same disk, where files stand until they are whole.
        statement: how they are stored.
        skipping: list the entries that have no vector; without it there are none.

    Returns:
        (vectors, entries without one).

    Raises:
        UserError: the disk is full, or the vectors cannot be stored like that.
    """
    skipped, ids, stated = companions(out)
    rows = entries = 0
    for part in parts():
        rows, entries = rows + len(part.ids), entries + part.entries
    if skipping:
        _write_lines(skipped, folder, _left_out(parts()))
    else:
        skipped.unlink(missing_ok=True)  # of a file that was here before
    if ids is not None:
        _write_lines(stated, folder, [statement.content()])
        _write_lines(ids, folder, (name for part in parts() for name in part.ids))
    with _appearing(out, folder) as file:
        if out.suffix == ".npy":
            _write_npy(file, parts(), statement, rows)
        else:
            _write_parquet(file, parts(), statement)
    return rows, entries - rows


@contextmanager
def _appearing(path: Path, folder: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its place when it is whole and on the disk; what it may leave is in `folder`."""
    unfinished = folder / path.name
    with writing(path):
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        sync(path.parent)


def _write_lines(path: Path, folder: Path, lines: Iterable[Any]) -> None:
    with _appearing(path, folder) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _left_out(parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
    start = 0
    for part in parts:
        for each in part.left_out:
            yield {"index": start + each.place, "id": each.id, "name": each.name, "reason": each.reason}
        start += part.entries


def _codes(rows: np.ndarray, statement: Statement) -> np.ndarray:
    ranges = None if statement.ranges is None else np.array(statement.ranges, np.float32)
    return quantize_embeddings(rows, statement.precision, ranges)


def _write_npy(file: IO[bytes], parts: Iterable[Part], statement: Statement, rows: int) -> None:
    dtype = np.dtype(DTYPES[statement.precision]).newbyteorder("<")
    shape = rows, stored_width(statement.precision, statement.dims)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(_codes(part.vectors, statement), dtype).tobytes())


def vector_type(statement: Statement) -> Any:
    """pyarrow's type of the column of vectors."""
    import pyarrow as pa

    item = pa.from_numpy_dtype(np.dtype(DTYPES[statement.precision]))
    return pa.list_(item, stored_width(statement.precision, statement.dims))


def _write_parquet(file: IO[bytes], parts: Iterable[Part], statement: Statement) -> None:
    import pyarrow as pa

    parquet = parquet_library()
    kind = vector_type(statement)
    schema = pa.schema([("id", pa.string()), ("vector", kind)], metadata={KEY: statement.text()})
    with parquet.ParquetWriter(file, schema) as writer:
        for group in _grouped(parts):
            codes = _codes(np.concatenate([part.vectors for part in group]), statement)
            column = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1), kind.value_type), kind.list_size)
            ids = pa.array([name for part in group for name in part.ids], pa.string())
            writer.write_table(pa.Table.from_arrays([ids, column], schema=schema))


def _grouped(parts: Iterable[Part]) -> Iterator[list[Part]]:
    group: list[Part] = []
    for part in parts:
        group.append(part)
        if sum(len(each.ids) for each in group) >= _GROUP:
            yield group
            group = []
    if group:
        yield group
