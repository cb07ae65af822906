"""Finds data sets below folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards.format import MANIFEST


def find_datasets(paths: Iterable[str]) -> list[Path]:
    """The given data sets, and all data sets below the given folders, in order. UserError if a folder holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        below = sorted(manifest.parent for manifest in path.rglob(MANIFEST) if ".partial" not in str(manifest))
        if not below:
            raise UserError(
                f"{path}: holds no data set (no {MANIFEST} in it or below); `data-prep index` makes one of other tars"
            )
        found += below
    return list(dict.fromkeys(found))
