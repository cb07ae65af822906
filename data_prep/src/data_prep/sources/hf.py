"""Data sets of the Hugging Face kind: folders, files and names that the `datasets` library reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.shards.format import JsonObject
from data_prep.sources.arrow import read_arrow
from data_prep.sources.hf_files import find_files, kinds_of
from data_prep.sources.parquet import partitions, read_parquet, whole_columns
from data_prep.sources.records import Dropped, Row, argument, option
from data_prep.sources.row_columns import Kinds
from data_prep.sources.row_sets import RowSet
from data_prep.sources.tables import read_lines

_ROWS = 500


@dataclass(frozen=True)
class Hf(RowSet):
    """a Hugging Face data set: a folder of save_to_disk, parquet files, or a name on the hub

    With an image column its rows are images with captions; else they are texts: `translation` structs, judged or scored
    passages (MS MARCO, Tevatron, FlagEmbedding, sentence-transformers), or the columns that `import texts` knows. Files
    of a hub are downloaded into the cache of the datasets library. No code of a data set is run.
    """

    data: str = argument("folder, .parquet, .arrow or .jsonl file, or OWNER/NAME on the hub")
    config: str = option("", "configuration (subset), where there are several")
    split: str = option("train", "split to take")
    revision: str = option("", "commit, branch or tag of the hub (default: its newest)")

    def found(self) -> tuple[Kinds | None, Iterator[JsonObject]]:
        files = find_files(self.data, self.config, self.split, self.revision)
        pieces = ({**piece, "roots": files.roots} for piece in files.pieces(_ROWS))
        if files.features is None:
            return None, pieces
        kinds = kinds_of(files.features)
        folders = dict.fromkeys(partitions(files.files[0]), "") if files.form == "parquet" else {}
        return replace(kinds, columns={**folders, **kinds.columns}), pieces

    def rows(self, piece: JsonObject, columns: Sequence[str]) -> Iterator[Row | Dropped]:
        if piece["format"] == "lines":
            return read_lines(piece)
        if piece["format"] == "parquet":
            return read_parquet(piece, columns or whole_columns(Path(piece["file"])))
        return read_arrow(piece, columns)
