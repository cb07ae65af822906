"""A collection of images and texts with their vectors, which is searched by a text or an image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_prep.shards import MANIFEST, Dataset, ShardError

from stage_trainer.bulk.encoder import EncoderSettings
from stage_trainer.bulk.entries import Entry, Input, Sample, name_of, open_inputs
from stage_trainer.bulk.job import Job, key_of, run
from stage_trainer.bulk.parts import digest_of
from stage_trainer.bulk.tables import Columns
from stage_trainer.bulk.vectors import companions
from stage_trainer.data.samples import image_of
from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import find
from stage_trainer.files import writing
from stage_trainer.metrics.retrieval import unit

KINDS = ("image", "text")


class Hit(NamedTuple):
    """Something found: its entry, and the cosine of its vector and the query's."""

    entry: Entry
    score: float


@dataclass(frozen=True)
class Collection:
    """Entries, and their vectors `[N, D]` at the full width.

    Attributes:
        left_out: what could not be encoded, as (name, reason).
    """

    entries: Sequence[Entry]
    vectors: np.ndarray
    left_out: Sequence[tuple[str, str]] = ()
    _cut: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def count(self, kind: str) -> int:
        return sum(entry.kind == kind for entry in self.entries)

    def search(self, query: np.ndarray, kinds: Sequence[str], dim: int, most: int) -> list[Hit]:
        """The nearest entries of some kinds, ranked together by the cosine of the first `dim` dims, nearest first.

        Args:
            query: `[D]`.
        """
        places = np.array([n for n, entry in enumerate(self.entries) if entry.kind in kinds], dtype=np.intp)
        scores = self._at(dim)[places] @ unit(query[None, :dim])[0]
        best = np.argsort(-scores, kind="stable")[:most]
        return [Hit(self.entries[places[n]], float(scores[n])) for n in best]

    def _at(self, dim: int) -> np.ndarray:
        """Vectors cut to a dim, at length one; those of the last dim that was asked for are kept."""
        if dim not in self._cut:
            self._cut.clear()
            self._cut[dim] = unit(self.vectors[:, :dim])
        return self._cut[dim]


def open_collection(
    model: Path, data: Sequence[Path], index: Path, options: dict[str, Any], device: str, say: Callable[[str], None]
) -> Collection:
    """The images and texts in `data` with their vectors, which are made once by what `stage-trainer encode` does and
    kept in the folder `index`, under a name that follows from the model's files, the options and the entries.

    Args:
        data: image files and folders of them, text files, data sets, corpora (of which the held-out data sets count).
        options: of `DualEncoder.encode`.

    Raises:
        UserError: there is nothing to search, or nothing of it can be encoded; what a disk says.
    """
    entries = list(_distinct(entry for path in data for each in _inputs(path) for entry in each))
    if not entries:
        raise UserError(f"{', '.join(map(str, data))}: the collection is empty; name a folder with images, or texts")
    settings = EncoderSettings(model, options)
    out = index / f"{digest_of(key_of(settings), entries)}.npy"
    with writing(index):
        index.mkdir(parents=True, exist_ok=True)
    if out.exists():
        say(f"the index is there: {out}")
    else:
        say(f"embedding {len(entries):,} images and texts …")
        run(Job([_Listed(entries)], out, settings, [device], skipping=True), say)
    skipped = companions(out).skipped
    try:
        gone = {line["index"]: (str(line["name"]), str(line["reason"])) for line in _lines(skipped)}
        vectors = np.load(out, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the index {out} cannot be read ({error}); remove it, and it is made anew") from error
    kept = [entry for number, entry in enumerate(entries) if number not in gone]
    if vectors.ndim != 2 or len(vectors) != len(kept):
        raise UserError(f"the index {out} is not of these entries; remove it, and it is made anew")
    if not kept:
        name, reason = next(iter(gone.values()))
        raise UserError(
            f"none of the {len(entries):,} images and texts can be used, the first one because: {name}: {reason}; "
            f"{skipped} lists them all"
        )
    return Collection(kept, vectors, list(gone.values()))


def content_of(entry: Entry) -> Any:
    """What `vision_tower.load_image` takes of an image's entry.

    Raises:
        ShardError: its data set is damaged, or no longer there.
    """
    if isinstance(entry.value, Sample):
        return image_of(Dataset.open(entry.value.directory).read(entry.value.number))
    return entry.value


def label_of(entry: Entry) -> str:
    """What a person calls it: a text itself, an image's file."""
    return str(entry.value) if entry.kind == "text" else name_of(entry)


def _inputs(path: Path) -> list[Input]:
    if not _has_sets(path):
        return open_inputs([path], None, Columns(None, None))
    found: list[Input] = []
    for held_out in find(path).sets:
        if held_out.images:
            found += open_inputs([held_out.directory], "image", Columns(None, None))
        found += open_inputs([held_out.directory], "text", Columns(None, None))
    return found


def _has_sets(path: Path) -> bool:
    return any(next(path.glob(f"{above}{MANIFEST}"), None) is not None for above in ("", "*/", "*/*/", "*/*/*/"))


def _distinct(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Without a text that was there before, and without an image of a data set that another one has, too."""
    seen: set[tuple[str, bytes]] = set()
    for entry in entries:
        try:
            value = content_of(entry) if isinstance(entry.value, Sample) else entry.value
        except ShardError:  # the encoder finds it, too, and leaves the entry out
            value = None
        if entry.kind == "text" or isinstance(value, bytes):
            content = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            key = entry.kind, hashlib.sha256(content).digest()
            if key in seen:
                continue
            seen.add(key)
        yield entry


class _Listed:
    """Entries that are known already, as an input of a job."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = entries

    def count(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
