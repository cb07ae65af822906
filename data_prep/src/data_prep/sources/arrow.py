"""Arrow files of the `datasets` library, some rows at a time: the file is mapped, not read into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.errors import needs
from data_prep.shards.format import JsonObject
from data_prep.sources.parquet import Values, rows_of
from data_prep.sources.records import Dropped

_BATCH = 16  # rows as Python values at a time: each may hold an image


def read_arrow(piece: JsonObject, columns: Sequence[str]) -> Iterator[Values | Dropped]:
    """Rows `first` to `end` of an Arrow file, with those of `columns` that it has; () for all."""
    library = needs("datasets", extra="datasets", what="reading Arrow files")
    path = Path(piece["file"])
    table = library.Dataset.from_file(str(path)).data.table
    table = table.select([name for name in columns or table.column_names if name in table.column_names])
    for first in range(piece["first"], piece["end"], _BATCH):
        yield from rows_of(table.slice(first, min(_BATCH, piece["end"] - first)), path.name, first)
