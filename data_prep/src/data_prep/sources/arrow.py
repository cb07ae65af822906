"""Arrow files of the `datasets` library, some rows at a time: the file is mapped, not read into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import needs
from data_prep.shards.format import JsonObject
from data_prep.sources.records import Dropped

_BATCH = 16  # rows as Python values at a time: each may hold an image


def read_arrow(piece: JsonObject, columns: Sequence[str]) -> Iterator[tuple[str, JsonObject] | Dropped]:
    """Rows `first` to `end` of an Arrow file, with those of `columns` that it has. A row with a value that cannot be
    read (bytes that are not UTF-8) is dropped alone."""
    library = needs("datasets", extra="datasets", what="reading Arrow files")
    path = Path(piece["file"])
    table = library.Dataset.from_file(str(path)).data.table
    table = table.select([name for name in columns if name in table.column_names])
    for first in range(piece["first"], piece["end"], _BATCH):
        yield from _values(table.slice(first, min(_BATCH, piece["end"] - first)), path.name, first)


def _values(rows: Any, name: str, first: int) -> Iterator[tuple[str, JsonObject] | Dropped]:
    try:
        values = rows.to_pylist()
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError is one; so are dates out of Python's range
        if rows.num_rows == 1:
            yield Dropped("a value that cannot be read", f"{name}, row {first + 1} ({error})"[:200])
            return
        for number in range(rows.num_rows):
            yield from _values(rows.slice(number, 1), name, first + number)
        return
    for number, row in enumerate(values, first + 1):
        yield f"{name}, row {number}", row
