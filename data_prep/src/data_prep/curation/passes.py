"""Passes over data sets: one where each sample is judged by itself, two where samples are compared.

A pass is a job of `execute`. To compare samples, a survey comes first: each unit writes an array file with what the
decision needs, and the rewriting pass reads the decisions on its own samples. The survey is in OUT/NAME.survey-HASH, is
resumed like any job, and is removed when the data set is published.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.execute import Execution, Job, Spec, Target, run_job
from data_prep.execute.engines import run_units
from data_prep.execute.progress import Progress
from data_prep.execute.unit import Output, read_receipt
from data_prep.samples import compact_json
from data_prep.shards import KINDS, Dataset, Row, Unusable, content_of
from data_prep.shards.files import replacing
from data_prep.shards.format import IMAGE_TYPES, JsonObject, is_key

TextDict = JsonObject  # a TEXT of the shard format


@dataclass
class Sample:
    """One sample: `content` is its JSON, or is made from the .txt where there is no JSON of the shard format."""

    kind: str
    row: Row
    members: dict[str, bytes]
    content: JsonObject

    @property
    def texts(self) -> list[list[TextDict]]:
        """Its lists of alternative texts: captions, or query, target and negatives; the lists of `content`."""
        if "captions" in self.content:
            return [self.content["captions"]]
        return [self.content["query"], self.content["target"], *self.content.get("negatives", [])]

    @property
    def words(self) -> list[str]:
        """All its texts, for the list of what was dropped."""
        return [text["text"] for texts in self.texts for text in texts]

    @property
    def image(self) -> bytes:
        """The bytes of its image file."""
        return next(self.members[name] for name in IMAGE_TYPES if name in self.members)


def open_alike(directories: Sequence[str]) -> list[Dataset]:
    """Open data sets of one kind. UserError if the kinds differ, or if one is named twice."""
    found = [Dataset.open(directory) for directory in directories]
    kinds = sorted({dataset.kind for dataset in found})
    if len(kinds) != 1:
        raise UserError(f"data sets of {' and '.join(kinds)}; expected one kind, run the command once for each")
    places = [dataset.directory.resolve() for dataset in found]
    if len(set(places)) != len(places):
        raise UserError("a data set is named twice; name each once")
    return found


def pieces_of(datasets: Sequence[Dataset]) -> list[JsonObject]:
    """A piece for each shard. Samples keep their keys if they all come from one data set."""
    pieces = []
    for dataset in datasets:
        first = 0
        for count in dataset.shard_sizes:
            pieces.append(
                {
                    "dataset": str(dataset.directory.resolve()),
                    "fingerprint": dataset.fingerprint,
                    "first": first,
                    "count": count,
                    "keep_keys": len(datasets) == 1,
                }
            )
            first += count
    return pieces


def samples_of(piece: JsonObject) -> Iterator[Sample]:
    """The samples of a piece.

    Raises:
        UserError: the data set changed since the job began, or a sample's JSON is not of the shard format.
    """
    dataset = Dataset.open(piece["dataset"], check=False)  # `open_alike` looked at every file, once for all pieces
    if dataset.fingerprint != piece["fingerprint"]:
        raise UserError(f"{dataset.directory} changed while it was worked on; run the command again")
    for number in range(piece["first"], piece["first"] + piece["count"]):
        yield sample_at(dataset, number)


def sample_at(dataset: Dataset, number: int) -> Sample:
    """One sample. UserError if its JSON is not of the shard format."""
    row, members = dataset.row(number), dataset.read(number)
    return Sample(dataset.kind, row, members, _content(dataset, row, members))


class Numbered:
    """The samples of several data sets by one number each, in order."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._datasets = [Dataset.open(directory) for directory in directories]
        self._begins = np.cumsum([0, *(len(dataset) for dataset in self._datasets)])

    def _place(self, number: int) -> tuple[Dataset, int]:
        which = int(np.searchsorted(self._begins, number, "right")) - 1
        return self._datasets[which], number - int(self._begins[which])

    def sample(self, number: int) -> Sample:
        """UserError if its JSON is not of the shard format."""
        return sample_at(*self._place(number))

    def name(self, number: int) -> str:
        """The sample's data set and key, as receipts name it."""
        dataset, place = self._place(number)
        return f"{dataset.directory}: {dataset.row(place).key}"


numbered = functools.lru_cache(1)(Numbered)  # as the units of a process read the same data sets


def write(output: Output, piece: JsonObject, sample: Sample, *, kind: str | None = None, tokens: int | None) -> None:
    """Write a sample with changed content; `tokens` of its longest text, None if unknown."""
    key = _key(piece, sample)
    members = {name: data for name, data in sample.members.items() if name not in ("json", "txt")}
    members["json"] = compact_json(sample.content)
    languages = sorted({text["language"] for texts in sample.texts for text in texts})
    output.write(kind or sample.kind, members, languages=languages, tokens=tokens, key=key)


def copy(output: Output, piece: JsonObject, sample: Sample) -> None:
    """Write a sample unchanged."""
    key = _key(piece, sample)
    output.write(sample.kind, sample.members, languages=sample.row.languages, tokens=sample.row.tokens, key=key)


def _key(piece: JsonObject, sample: Sample) -> str | None:
    """The sample's own key if it can keep it: those of other people's tars may be paths."""
    return sample.row.key if piece["keep_keys"] and is_key(sample.row.key) else None


@dataclass(frozen=True)
class Survey:
    """The first of two passes.

    work: "module:function", called as function(piece, options, output), with the path `piece["survey"]` for its arrays.
    """

    target: Target
    work: str
    pieces: Sequence[JsonObject]
    options: JsonObject

    @property
    def folder(self) -> Path:
        """The folder of this survey; other input or options have another."""
        identity = json.dumps([self.work, list(self.pieces), self.options], sort_keys=True)
        return Path(self.target.out) / f"{self.target.name}.survey-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def files(self) -> list[Path]:
        """The array file of each piece."""
        return [self.folder / f"{number:05d}.npz" for number in range(len(self.pieces))]

    def run(self, execution: Execution) -> bool:
        """Do the rest of this task's share; False if other array tasks have pieces left."""
        specs = [
            Spec(self.work, str(self.folder), number, {**piece, "survey": str(file)}, self.options)
            for number, (piece, file) in enumerate(zip(self.pieces, self.files(), strict=True))
        ]
        first, step = execution.task
        own = specs[first::step]
        left = [spec for spec in own if not _surveyed(spec)]
        for spec in left:
            spec.receipt_path.unlink(missing_ok=True)  # of a piece whose arrays are gone: it would count as done
        print(f"{self.folder}: surveying, {len(own) - len(left)} of {len(own)} units are done")
        progress = Progress(max(1, len(left)))
        for receipt in run_units(left, engine=execution.engine, workers=execution.workers or os.cpu_count() or 1):
            progress.add(receipt.came_in)
        progress.finish()
        return all(_surveyed(spec) for spec in specs)


def job_on(
    datasets: Sequence[Dataset],
    target: Target,
    title: str,
    work: str,
    options: JsonObject,
    survey: Survey | None = None,
) -> Job:
    """The job that reads data sets; the pieces of one that follows a survey have the paths of its decisions."""
    pieces = pieces_of(datasets)
    if survey is not None:
        for number, piece in enumerate(pieces):
            piece["decided"] = str(survey.folder / f"decided-{number:05d}.npz")
    return Job(title, target, work, pieces, options, datasets[0].tokenizer_sha256)


def two_passes(
    survey: Survey, job: Job, decide: Callable[[Survey], Iterable[dict[str, np.ndarray]]], execution: Execution | None
) -> JsonObject | None:
    """Survey, decide on all samples, and rewrite; returns the receipt, None if other array tasks have units left.

    `decide` yields arrays for each piece of the job, among them `values`; its work reads them with `decision`.
    """
    execution = execution or Execution()
    if not _published(job):
        if not survey.run(execution):
            print("other array tasks have units left; when all are done, run the array again to continue")
            return None
        try:
            _decide(survey, job, decide)
        except UserError:
            if not _published(job):  # then another array task was faster, and removed the survey
                raise
    receipt = run_job(job, execution)
    if receipt is not None:
        for folder in Path(job.target.out).glob(f"{job.target.name}.survey-*"):
            shutil.rmtree(folder, ignore_errors=True)
    return receipt


def _published(job: Job) -> bool:
    return any((job.target.folder(kind) / "receipt.json").exists() for kind in KINDS)


def _decide(survey: Survey, job: Job, decide: Callable[[Survey], Iterable[dict[str, np.ndarray]]]) -> None:
    print(f"{survey.folder}: deciding, over all samples")
    progress = Progress(len(job.pieces))
    for piece, arrays in zip(job.pieces, decide(survey), strict=True):
        save(Path(piece["decided"]), **arrays)
        progress.add(len(arrays["values"]))
    progress.finish()


def decision(piece: JsonObject) -> dict[str, np.ndarray]:
    """The decisions on the samples of a piece."""
    return load(Path(piece["decided"]))


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free some space and run again"
        ) from error


def load(path: Path, *names: str) -> dict[str, np.ndarray]:
    """What `save` wrote: the arrays of these names, without a name all of them."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names or arrays.files}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run again, it is computed anew") from error


def _surveyed(spec: Spec) -> bool:
    return read_receipt(spec) is not None and Path(spec.piece["survey"]).exists()


def _content(dataset: Dataset, row: Row, members: dict[str, bytes]) -> JsonObject:
    try:
        content = content_of(dataset.kind, members, row.languages[0] if len(row.languages) == 1 else "und")
    except Unusable as error:
        raise UserError(
            f"{dataset.directory / row.shard}: sample {row.key!r}: {error}; `data-prep validate` finds all such "
            "samples, import the data set again without them"
        ) from error
    # Of shards of another format, a .txt beside an image.
    return content if "json" in members else {**content, "source": dataset.source, "item": row.item}
