"""Evaluation sets of texts, which `data-prep evalset beir` and `sts` write, as data sets that a pass compares with."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from data_prep.errors import UserError
from data_prep.execute import Target
from data_prep.samples import compact_json
from data_prep.shards import DatasetWriter
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.judged import with_title
from data_prep.sources.text_evalsets import SCHEMA

_SET = "set.json"
_FIELDS = ("text", "sentence1", "sentence2")


def as_data_sets(directories: Sequence[str], target: Target) -> list[str]:
    """The same folders, but of each set of texts a data set that holds every text of it as a sample, named by its file
    and line. It lies among the surveys of `target`, and goes with them.

    Raises:
        UserError: a set of texts is damaged, or the disk refuses.
    """
    return [str(_converted(Path(each), target)) if (Path(each) / _SET).is_file() else each for each in directories]


def _converted(folder: Path, target: Target) -> Path:
    raw = (folder / _SET).read_bytes()
    _check(folder, raw)
    digest = hashlib.sha256(str(folder.resolve()).encode() + raw).hexdigest()[:12]
    whole = Path(target.out) / f"{target.name}.survey-against-{digest}" / folder.resolve().name
    if whole.is_dir():
        return whole
    partial = whole.with_name(f"{whole.name}.partial-{os.getpid()}")  # of array tasks each may be the first
    shutil.rmtree(partial, ignore_errors=True)
    whole.parent.mkdir(parents=True, exist_ok=True)
    with DatasetWriter(partial, kind="text-pairs", source="evalset") as writer:
        for key, text in _texts(folder):
            side = [{"text": text, "language": "und"}]
            writer.write(key, {"json": compact_json({"query": side, "target": side})}, languages=["und"], tokens=None)
    try:
        partial.rename(whole)
    except OSError:
        if not whole.is_dir():
            raise
        shutil.rmtree(partial)
    return whole


def _check(folder: Path, raw: bytes) -> None:
    """UserError unless the set's files are those that its set.json names."""
    try:
        content: JsonObject = parse_json(raw)
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r:.80}, expected {SCHEMA!r}")
        for name, stated in content["files"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != stated["sha256"]:
                    raise ValueError(f"{name} has changed since it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: no whole evaluation set of texts ({error}); make it again: data-prep evalset"
        ) from error


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(a sample's key, a text): queries-7 is that of line 7 of queries.jsonl.

    A document with a title comes without and with it, as corpus-7 and corpus-7-titled: importers put both into a text.
    """
    for path in sorted(folder.glob("*.jsonl")):
        number = count(1)
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row, place = parse_json(line), next(number)
                texts = [row[name] for name in _FIELDS if isinstance(row.get(name), str) and row[name].strip()]
                for side, text in enumerate(texts):
                    yield f"{path.stem}-{place}" + (f"-{side + 1}" if len(texts) > 1 else ""), text
                if (titled := with_title(row.get("title"), row.get("text", "")).text) not in ("", *texts):
                    yield f"{path.stem}-{place}-titled", titled
