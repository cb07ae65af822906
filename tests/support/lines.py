"""A data set in the form before the present one, `trilith-shards/1`: its sidecars are JSON lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data_prep.shards import Dataset


def as_lines(directory: Path) -> Path:
    """Turns a data set into one of `trilith-shards/1`, in place; returns its folder."""
    data = Dataset.open(directory)
    manifest = {**data.manifest, "schema": "trilith-shards/1"}
    for number, entry in enumerate(manifest["shards"]):
        rows = [data.row(index) for index in data.samples_of(number)]
        lines = [
            {"key": row.key, "members": row.members, "languages": row.languages, "tokens": row.tokens,
             "sha256": row.sha256}
            for row in rows
        ]  # fmt: skip
        raw = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        stem = entry["name"].removesuffix(".tar")
        (directory / f"{stem}.index.jsonl").write_bytes(raw)
        (directory / f"{stem}.index.npy").unlink()
        entry |= {"index_bytes": len(raw), "index_sha256": hashlib.sha256(raw).hexdigest()}
    (directory / "shards.npy").unlink(missing_ok=True)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
