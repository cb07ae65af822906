"""Parquet files, a few rows at a time, in memory that does not grow with the row group.

What must be in memory is a page, unpacked: writers put at most 1,024 large values into one. pyarrow would also read all
of a row group ahead.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.errors import UserError, needs
from data_prep.shards.format import JsonObject
from data_prep.sources.records import Dropped, file_stat

Values = tuple[str, JsonObject]  # place and columns of a row

_BATCH = 8 * 2**20  # bytes of rows that are Python values at a time; of _ROWS rows at most
_ROWS = 1000
_BUFFER = 2**20  # bytes that are read at a time
_LARGE = 64 * 2**20  # bytes of a row group from which the file is mapped
_PARTITION = re.compile(r"([A-Za-z_][\w.-]*)=(.+)")
_DATES = ("date", "time", "duration", "month")  # how the names of such types begin


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
    """The names of a file's columns, then of fields of structs (`translation.en`). UserError as of `parquet_pieces`."""
    return _read_footer(path)[1]


def whole_columns(path: Path) -> list[str]:
    """The names of a file's columns, without those of fields. UserError as of `parquet_pieces`."""
    metadata, _ = _read_footer(path)
    return [*partitions(path), *metadata.schema.to_arrow_schema().names]


def partitions(path: Path) -> dict[str, str | None]:
    """The columns that a file's folders stand for, as Spark and Hive write them: `language=de/part-0.parquet`."""
    found = [match.groups() for part in path.parts[:-1] if (match := _PARTITION.fullmatch(part))]
    return {name: None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for name, value in found}


def _read_footer(path: Path) -> tuple[Any, list[str]]:
    parquet = needs("pyarrow.parquet", extra="parquet", what="reading parquet")
    try:
        metadata = parquet.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error})") from error
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise UserError(f"{path}: has the column {twice[0]!r} twice; rename one")
    names = [*schema.names, *(name for name in partitions(path) if name not in schema.names)]
    return metadata, [*names, *(name for name in _paths(schema) if name not in names)]


def _paths(fields: Iterable[Any], before: str = "") -> Iterator[str]:
    """The names of columns and, as `translation.en`, of the fields of structs."""
    for field in fields:
        yield f"{before}{field.name}"
        if str(field.type).startswith("struct<"):
            yield from _paths(field.type, f"{before}{field.name}.")


def read_parquet(piece: JsonObject, columns: Sequence[str], *, texts: Sequence[str] = ()) -> Iterator[Values | Dropped]:
    """The rows of a piece, with those of `columns` that the file has.

    texts: columns of texts; where a file has bytes there, as of writers that do not mark text, they are UTF-8.
    """
    texts = [*texts, *(name.partition(".")[0] for name in texts)]  # a field of a struct comes in its column
    path = Path(piece["file"])
    metadata, names = _read_footer(path)
    file, release = _opened(path, metadata, piece["groups"])
    own = metadata.schema.to_arrow_schema().names  # what a file says itself counts before its folders' names
    folders = {name: value for name, value in partitions(path).items() if name in columns and name not in own}
    with file:
        present = [name for name in columns if name in names and name not in folders]
        first = piece["row"]
        for group in piece["groups"]:
            for row in _group(file, group, present, piece.get("shown", path.name), first, release):
                if not isinstance(row, Dropped) and folders:
                    row = row[0], {**row[1], **folders}
                yield row if isinstance(row, Dropped) or not texts else _decoded(row, texts)
            first += metadata.row_group(group).num_rows


def _opened(path: Path, metadata: Any, groups: Sequence[int]) -> tuple[Any, Callable[[], object]]:
    """A file to read row groups of, and a call that gives back the memory of what was read; UserError if it is gone.

    Of a large row group the file is mapped, so that pages which are not packed are not copied.
    """
    pyarrow = needs("pyarrow", extra="parquet", what="reading parquet")
    parquet = needs("pyarrow.parquet", extra="parquet", what="reading parquet")
    # Many writers give pages a checksum; without it a damaged page may be texts like any other.
    opened = partial(parquet.ParquetFile, metadata=metadata, pre_buffer=False, page_checksum_verification=True)
    try:
        if all(metadata.row_group(group).total_byte_size < _LARGE for group in groups):
            return opened(path, buffer_size=_BUFFER), lambda: None
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the usual one keeps what it frees
        with path.open("rb") as raw:
            mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
        return opened(reader), partial(mapped.madvise, mmap.MADV_DONTNEED)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error})") from error


def _group(
    file: Any, group: int, columns: Sequence[str], name: str, first: int, release: Callable[[], object]
) -> Iterator[Values | Dropped]:
    """The rows of a row group. Damage costs the rest of the group, and nothing of the next one."""
    metadata = file.metadata.row_group(group)
    number, end = first, first + metadata.num_rows
    rows = min(_ROWS, max(1, _BATCH * metadata.num_rows // max(1, metadata.total_byte_size)))
    try:
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
            yield from rows_of(batch, name, number)
            number += batch.num_rows
            release()
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        where = f"{name} after row {number} ({error})"[:200]
        yield Dropped("rest of a parquet row group that is damaged", where, max(1, end - number))


def rows_of(batch: Any, name: str, first: int) -> Iterator[Values | Dropped]:
    """The rows of a record batch or table of Arrow, the first being number `first` from 0 in the file `name`. Maps
    become objects. Arrow does not check texts: one that cannot be read costs its row alone."""
    try:
        values = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):  # not UTF-8; a date that Python does not have; a key twice
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from rows_of(batch.slice(number, 1), name, first + number)
        else:
            yield _one_row(batch, f"{name}, row {first + 1}")
        return
    for number, row in enumerate(values, first + 1):
        yield f"{name}, row {number}", row


def _one_row(batch: Any, where: str) -> Values | Dropped:
    """The row of a batch of one that holds a value which cannot be read; a date is no text, so it is left out."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            (row[name],) = column.to_pylist(maps_as_pydicts="strict")
        except (ValueError, OverflowError, KeyError) as error:
            if not str(column.type).startswith(_DATES):
                reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that cannot be read"
                return Dropped(reason, where)
            row[name] = None
    return where, row


def _decoded(row: Values, texts: Sequence[str]) -> Values | Dropped:
    """A row whose columns of texts hold no bytes."""
    where, values = row
    try:
        return where, {name: _text(value) if name in texts else value for name, value in values.items()}
    except UnicodeDecodeError:
        return Dropped("not UTF-8", where)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return list(map(_text, value))
    return {name: _text(each) for name, each in value.items()} if isinstance(value, dict) else value


def image_bytes(value: object) -> bytes | None:
    """An image column's bytes: plain, or in the struct {bytes, path} of the datasets library."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None
