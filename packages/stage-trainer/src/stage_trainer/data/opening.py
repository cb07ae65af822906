"""The data sets that a recipe names, opened and looked at."""

from __future__ import annotations

from pathlib import Path

from data_prep.shards import Dataset

from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote_data import RemotePlace, open_place, place
from stage_trainer.data.samples import shard_errors_explained
from stage_trainer.errors import UserError
from stage_trainer.recipe import Source


def open_data_set(directory: Path | RemotePlace, kinds: tuple[str, ...], *, check: bool = True) -> Dataset:
    """A data set of one of `kinds` (the beginnings of their names); `check`: look at every file of a folder.

    Raises:
        UserError: it is missing, damaged or of another kind.
    """
    with shard_errors_explained():
        data = open_place(directory, check=check)
    if not data.kind.startswith(kinds):
        raise UserError(f"{data.directory} holds {data.kind}, which cannot serve here; expected {kinds[0]}…")
    return data


def open_source(config: DataConfig, source: Source, batch: int, kinds: tuple[str, ...]) -> Dataset:
    """A training source of a recipe, of one of `kinds`.

    Raises:
        UserError: as `open_data_set`; one that is smaller than a batch.
    """
    data = open_data_set(place(config, "train", source.path), kinds, check=False)  # `FileChecks` does
    if len(data) < batch:
        raise UserError(
            f"{data.directory} has {len(data)} samples, too few for one batch of {batch}; "
            "lower the batch size or add data"
        )
    return data
