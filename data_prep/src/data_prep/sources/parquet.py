"""Parquet files, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, needs
from data_prep.shards.format import JsonObject
from data_prep.sources.records import Dropped, file_stat

Values = tuple[str, JsonObject]  # place and columns of a row

_BATCH = 16  # rows in memory at a time: each may hold an image


def parquet_pieces(paths: Sequence[Path], rows: int, *, columns: Sequence[str]) -> Iterator[JsonObject]:
    """Row groups of the files, some of them together if they are small.

    Raises:
        UserError: pyarrow is not installed, a file is no parquet file, or it lacks one of `columns`.
    """
    for path in paths:
        metadata, found = _read_footer(path)
        if missing := [name for name in columns if name not in found]:
            raise UserError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(found)}")
        groups: list[int] = []
        count = first = 0
        for number in range(metadata.num_row_groups):
            groups.append(number)
            count += metadata.row_group(number).num_rows
            if count >= rows or number == metadata.num_row_groups - 1:
                yield {"file": str(path), **file_stat(path), "groups": groups, "row": first}
                first, count, groups = first + count, 0, []


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns. UserError as of `parquet_pieces`."""
    return _read_footer(path)[1]


def _read_footer(path: Path) -> tuple[Any, list[str]]:
    parquet = needs("pyarrow.parquet", extra="parquet", what="reading parquet")
    try:
        metadata = parquet.read_metadata(path)
        return metadata, metadata.schema.to_arrow_schema().names
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error})") from error


def read_parquet(piece: JsonObject, columns: Sequence[str]) -> Iterator[Values | Dropped]:
    """The rows of a piece, with those of `columns` that the file has."""
    parquet = needs("pyarrow.parquet", extra="parquet", what="reading parquet")
    path = Path(piece["file"])
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error})") from error
    with file:
        present = [name for name in columns if name in file.schema_arrow.names]
        first = piece["row"]
        for group in piece["groups"]:
            yield from _group(file, group, present, piece.get("shown", path.name), first)
            first += file.metadata.row_group(group).num_rows


def _group(file: Any, group: int, columns: Sequence[str], name: str, first: int) -> Iterator[Values | Dropped]:
    """The rows of a row group. Damage costs the rest of the group, and nothing of the next one."""
    number, end = first, first + file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
            yield from rows_of(batch, name, number)
            number += batch.num_rows
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        where = f"{name} after row {number} ({error})"[:200]
        yield Dropped("rest of a parquet row group that is damaged", where, max(1, end - number))


def rows_of(batch: Any, name: str, first: int) -> Iterator[Values | Dropped]:
    """The rows of a record batch or table of Arrow, the first being number `first` from 0 in the file `name`. Arrow
    does not check texts: one that cannot be read costs its row alone."""
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # not UTF-8; a date that Python does not have
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from rows_of(batch.slice(number, 1), name, first + number)
            return
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that cannot be read"
        yield Dropped(reason, f"{name}, row {first + 1}")
        return
    for number, row in enumerate(values, first + 1):
        yield f"{name}, row {number}", row


def image_bytes(value: object) -> bytes | None:
    """An image column's bytes: plain, or in the struct {bytes, path} of the datasets library."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None
