"""Identifies a file in the identity of a job."""

from __future__ import annotations

from pathlib import Path

from data_prep.shards.format import JsonObject


def file_stat(path: Path) -> JsonObject:
    """Size and modification time (ns), which reveal an edited file without reading it. OSError if it is gone."""
    status = path.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}
