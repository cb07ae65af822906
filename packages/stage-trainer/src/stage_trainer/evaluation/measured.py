"""What a model reached on one evaluation set, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.shards import MANIFEST

from stage_trainer.evaluation.sets import SET, EvalSet, plain
from stage_trainer.files import read_json, write_whole

PROTOCOL = 1
"""Raised when a protocol changes, so that no figure of the former one is taken for one of the new."""

Figures = dict[str, dict[str, dict[str, float]]]
"""measure → row (a language, a set) → dim → value, from 0 to 1."""


@dataclass(frozen=True)
class Measured:
    """Figures on a set.

    Attributes:
        counts: what was measured on, by what is counted.
        notes: what a reader of the figures has to know: gaps, and how the set differs from the published one.
        whole: whether its counts are the published ones, so that figures may be compared.
    """

    figures: Figures
    counts: dict[str, int]
    notes: tuple[str, ...] = ()
    whole: bool = True

    def value(self, measure: str, row: str, dim: int) -> float | None:
        return self.figures.get(measure, {}).get(row, {}).get(str(dim))


def compared(known: EvalSet, counts: Mapping[str, int], where: str = "") -> list[str]:
    """Notes on counts that are not the published ones. `where`: of which language they are."""
    notes = []
    for what, published in known.counts.items():
        if (found := counts.get(what)) is not None and found not in published:
            numbers = " or ".join(f"{number:,}" for number in published)
            notes.append(f"{known.name}{where} has {found:,} {what}, the published set {numbers}")
    return notes


def compared_by_language(known: EvalSet, what: str, counts: Mapping[str, int]) -> list[str]:
    """The same of counts by language, with one note for those that have the same number."""
    by_number: dict[int, list[str]] = {}
    for language, number in counts.items():
        by_number.setdefault(number, []).append(language)
    several = len(known.languages) > 1
    return [
        note
        for number, languages in by_number.items()
        for note in compared(known, {what: number}, f" in {', '.join(languages)}" if several else "")
    ]


@dataclass(frozen=True)
class Key:
    """What a kept figure depends on; with any other one it is measured anew."""

    model: str
    data: str
    settings: dict[str, str] = field(default_factory=dict)
    protocol: int = PROTOCOL

    def differs(self, other: Mapping[str, Any]) -> list[str]:
        words = {"model": "the model's weights", "data": "the data", "settings": "the settings", "protocol": "the code"}
        return [words[name] for name, value in dataclasses.asdict(self).items() if other.get(name) != value]


def data_fingerprint(folder: Path) -> str:
    """sha256 of what stands for a set's content: its manifest, which has the hash of every file, or its list of files
    with sizes and times."""
    for name in (MANIFEST, SET):
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def kept(path: Path, key: Key) -> tuple[Measured | None, str]:
    """(figures that were written with the same key, why there are none: "" if nothing was written)."""
    if not path.is_file():
        return None, ""
    try:
        content = read_json(path)
        if different := key.differs(content["key"]):
            return None, f"{' and '.join(different)} changed"
        of = content["measured"]
        figures: Figures = of["figures"]
        for rows in figures.values():
            for dims in rows.values():
                if not all(isinstance(value, float | int) and math.isfinite(value) for value in dims.values()):
                    raise ValueError("a figure is no number")
        return Measured(figures, dict(of["counts"]), tuple(of["notes"]), bool(of["whole"])), ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{path} cannot be read ({error})"


def keep(path: Path, key: Key, measured: Measured, **more: object) -> None:
    """Writes figures, so that an interrupted evaluation goes on after them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**more, "key": dataclasses.asdict(key), "measured": dataclasses.asdict(measured)}
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def file_of(out: Path, model: str, known: EvalSet) -> Path:
    """Where a model's figures on a set are kept: by its name; the file has the hash of its weights."""
    readable = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in model).strip(".-")[-60:]
    return out / f"{readable or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:6]}" / f"{plain(known.name)}.json"
