"""A job: units that an engine runs, and data sets that are published once every unit has its receipt."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from data_prep.execute import dropped
from data_prep.execute.engines import ENGINES, run_units
from data_prep.execute.progress import Progress
from data_prep.execute.unit import Spec, read_receipt
from data_prep.names import check_name
from data_prep.shards import KINDS, ShardError, alone, write_manifest
from data_prep.shards.files import read_object, sync, write_file, writing
from data_prep.shards.format import SCHEMA_OF_LINES, SHARD_SAMPLES, JsonObject, index_name

say = functools.partial(print, flush=True)  # a job runs for hours, often into a file
_EXAMPLES = 5  # of what was dropped, per reason


@dataclass(frozen=True)
class Target:
    """Where data sets go, `out`/KIND/`name`, and how many samples a shard of theirs holds at most."""

    out: str
    name: str
    samples_per_shard: int = SHARD_SAMPLES

    def __post_init__(self) -> None:
        check_name(self.name, "name")

    def folder(self, kind: str) -> Path:
        """The data set of a kind."""
        return Path(self.out) / kind / self.name

    @property
    def dropped(self) -> Path:
        """The list of what was dropped, if everything was and there is no data set to put it in."""
        return Path(self.out) / f"{self.name}.{dropped.NAME}"

    def lock(self, task: str = "") -> Path:
        """The lock file for writing there, or that of one array task."""
        return Path(self.out) / f".{self.name}{task and '.'}{task}.lock"


@dataclass(frozen=True)
class Job:
    """What is to be done; equal jobs write the same bytes.

    title: the command ("import images"). work: "package.module:function", called as function(piece, options, output)
    for each of `pieces`. options: what all units share. Pieces and options are plain JSON values.
    tokenizer_sha256: hash of the tokenizer that counted tokens, None if nothing was counted.
    """

    title: str
    target: Target
    work: str
    pieces: Sequence[JsonObject]
    options: JsonObject = field(default_factory=dict)
    tokenizer_sha256: str | None = None

    @property
    def partial(self) -> Path:
        """The folder that holds everything until the data sets are complete."""
        return Path(self.target.out) / f"{self.target.name}.partial"

    def identity(self) -> JsonObject:
        """What the job is, as its receipt names it."""
        pieces = hashlib.sha256(json.dumps(list(self.pieces), sort_keys=True).encode()).hexdigest()
        fields = {
            "title": self.title,
            "name": self.target.name,
            "work": self.work,
            "options": self.options,
            "samples_per_shard": self.target.samples_per_shard,
            "tokenizer_sha256": self.tokenizer_sha256,
            "units": len(self.pieces),
            "pieces": pieces,
        }
        plain: JsonObject = json.loads(json.dumps(fields))
        return plain

    def specs(self) -> list[Spec]:
        """The units of work."""
        return [
            Spec(self.work, str(self.partial), number, piece, self.options, self.target.samples_per_shard)
            for number, piece in enumerate(self.pieces)
        ]


@dataclass(frozen=True)
class Execution:
    """How a job is run; none of it changes the output.

    engine: "processes" or "ray". workers: units at a time, the number of cores by default. task: (i, n), to do only
    units i, i + n, i + 2n, …, as the i-th of n array tasks; the task that completes the last receipt publishes.
    """

    engine: str = "processes"
    workers: int | None = None
    task: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine {self.engine!r}: expected one of {', '.join(ENGINES)}")
        if not 0 <= self.task[0] < self.task[1]:
            raise UserError(f"task {self.task[0]}/{self.task[1]}: expected i/n with i from 0 to n - 1")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"{self.workers} workers: expected at least 1")


def run_job(job: Job, execution: Execution | None = None, *, log: Callable[[str], None] = say) -> JsonObject | None:
    """Do the remaining units of a job and publish its data sets; returns the receipt that is stored beside them.

    Returns None if other array tasks have units left: the last of them publishes.

    Raises:
        UserError: the target holds something else, there is nothing to do or nothing came out, or a unit says so.
        ShardError: the disk refuses.
    """
    execution = execution or Execution()
    if not job.pieces:
        raise UserError(f"{job.title}: nothing found to work on")
    with writing(job.partial), _alone(job):
        finished = _published(job, log)  # perhaps a moment ago, by another process
        if finished is not None:
            return finished
        _begin(job)
    part = "{}-of-{}".format(*execution.task)
    with alone(job.target.lock(part), f"{job.partial} (task {part})"):
        return _go_on(job, execution, log)


def _go_on(job: Job, execution: Execution, log: Callable[[str], None]) -> JsonObject | None:
    mark = job.partial / "publish.json"
    if job.partial.exists() and not mark.exists():
        _run(job, execution, log)
    with _alone(job):
        if not job.partial.exists():  # another process published
            return _published(job, log)
        if not mark.exists() and not _prepare(job):
            log(f"{job.partial}: this task is done, others have units left; the last one publishes")
            return None
        receipt = _publish(job)
    for line in table(receipt):
        log(line)
    folders = [job.target.folder(kind) for kind in receipt["went_out"]]
    log(f"written: {', '.join(map(str, folders))}")
    if receipt.get("listed"):
        log(f"each that was dropped: {folders[0] / dropped.NAME}")
    return receipt


def table(receipt: JsonObject) -> list[str]:
    """The summary that a command prints: what came in, what was dropped, why and where first, what went out."""
    lines = ["", f"{'came in':<58}{receipt['came_in']:>10}"]
    examples = receipt.get("examples", {})
    for heading, counts in (("dropped, and why", receipt["dropped"]), ("of these", receipt["notes"])):
        lines += [heading] * bool(counts)
        for name, count in counts.items():
            first = examples.get(name) if counts is receipt["dropped"] else None
            lines.append(f"  {name:<56}{count:>10}" + (f"  {first[0]}" if first else ""))
    lines += ["went out", *(f"  {name:<56}{count:>10}" for name, count in receipt["went_out"].items()), ""]
    return lines


def _published(job: Job, log: Callable[[str], None]) -> JsonObject | None:
    """The receipt of this job if its data sets are there, and says so; UserError if the place holds something else."""
    found = [folder for folder in map(job.target.folder, KINDS) if folder.exists()]
    if not found or (job.partial / "publish.json").exists():
        return None
    for folder in found:
        try:
            receipt = read_object(folder / "receipt.json")
            other = receipt["job"]
        except (OSError, ShardError, KeyError) as error:
            raise UserError(f"{folder}: exists already and is not ours to replace; choose another --name") from error
        if other != job.identity():
            raise UserError(
                f"{folder}: exists already, from something else ({_difference(other, job.identity())}); remove it or "
                f"choose another --name{_same_cut(other, job.identity())}"
            )
    log(f"{job.target.out}: {job.target.name} is there already, from the same input and options; nothing to do")
    return receipt


def _begin(job: Job) -> None:
    """Create the partial folder, or check that the existing one is of this job."""
    mark, identity = job.partial / "job.json", job.identity()
    job.partial.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        job.target.dropped.unlink(missing_ok=True)  # of an earlier try
        write_file(mark, _raw(identity))
    elif (other := _ours(mark)) != identity:
        raise UserError(
            f"{job.partial}: holds another unfinished job ({_difference(other, identity)}); finish that one, or "
            f"remove the folder{_same_cut(other, identity)}"
        )


def _ours(mark: Path, *needed: str) -> JsonObject:
    """What a file of the partial folder says. ShardError if it is damaged or lacks something."""
    try:
        found = read_object(mark)
        if missing := [name for name in needed if name not in found]:
            raise ShardError(f"{mark}: damaged (without {', '.join(missing)})")
    except ShardError as error:
        raise ShardError(f"{error}; remove {mark.parent} and run again") from error
    return found


def _run(job: Job, execution: Execution, log: Callable[[str], None]) -> None:
    first, step = execution.task
    own = job.specs()[first::step]
    left = [spec for spec in own if read_receipt(spec) is None]
    done = len(own) - len(left)
    if done:
        log(f"{job.partial}: going on, {done} of {len(own)} units are done")
    progress = Progress(len(own))
    for _ in range(done):
        progress.add(0, new=False)
    for receipt in run_units(left, engine=execution.engine, workers=execution.workers or os.cpu_count() or 1):
        progress.add(sum(receipt.went_out.values()))
    progress.finish()


def _prepare(job: Job) -> bool:
    """Write manifests and receipts if every unit is done, and the mark that only the renames are left."""
    shards: dict[str, list[JsonObject]] = {}
    examples: dict[str, list[str]] = {}
    counts = {name: Counter[str]() for name in ("went_out", "dropped", "notes")}
    came_in = listed = 0
    lists = [spec.dropped_path for spec in job.specs()]
    for spec in job.specs():
        receipt = read_receipt(spec)
        if receipt is None:
            return False
        came_in += receipt.came_in
        listed += receipt.listed
        for name, counter in counts.items():
            counter.update(getattr(receipt, name))
        for reason, places in receipt.examples.items():
            kept = examples.setdefault(reason, [])
            kept += places[: _EXAMPLES - len(kept)]
        for kind, entries in receipt.shards.items():
            shards.setdefault(kind, []).extend(entries)
    if not shards:
        reasons = ", ".join(
            f"{reason}: {count}, first {(examples.get(reason) or ['?'])[0]}"
            for reason, count in sorted(counts["dropped"].items())
        )
        dropped.put_together(lists, job.target.dropped)
        shutil.rmtree(job.partial)
        place = f"; each that was dropped: {job.target.dropped}" if listed else ""
        raise UserError(f"{job.title}: {came_in} came in and nothing went out ({reasons or 'no samples'}){place}")
    whole = {
        "job": job.identity(),
        "came_in": came_in,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
        "examples": dict(sorted(examples.items())),
        **({"listed": dropped.NAME} if listed else {}),
    }
    raw = _raw(whole) + b"\n"
    for kind, entries in sorted(shards.items()):
        folder = job.partial / kind
        write_manifest(folder, kind=kind, source=job.target.name, shards=entries, tokenizer_sha256=job.tokenizer_sha256)
        with writing(folder):
            write_file(folder / "receipt.json", raw)
            dropped.put_together(lists, folder / dropped.NAME)
            # Left by a killed unit, or of a unit that an earlier release began and this one did anew.
            for leftover in [*folder.glob("*.tmp"), *folder.glob(index_name("*", SCHEMA_OF_LINES))]:
                leftover.unlink()
    with writing(job.partial):
        write_file(job.partial / "publish.json", raw)
    return True


def _publish(job: Job) -> JsonObject:
    """Rename the data sets into place; if it is stopped, the next run continues."""
    with writing(job.partial):
        receipt = _ours(job.partial / "publish.json", "came_in", "dropped", "notes", "went_out")
        for kind in receipt["went_out"]:
            folder = job.target.folder(kind)
            if (job.partial / kind).exists():
                folder.parent.mkdir(exist_ok=True)
                (job.partial / kind).rename(folder)
                sync(folder.parent)
        for leftover in job.partial.iterdir():  # the mark last, or a run after a kill would see nothing left to do
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "publish.json":
                leftover.unlink()
        shutil.rmtree(job.partial)
    return receipt


def _alone(job: Job) -> AbstractContextManager[None]:
    """One array task at a time."""
    return alone(job.target.lock(), str(job.partial), wait=True)


def _raw(value: JsonObject) -> bytes:
    """As JSON. A path that is not UTF-8 has lone surrogates; written as JSON escapes they are read back unchanged."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _difference(other: object, ours: JsonObject) -> str:
    """How two identities differ, for a message."""
    if not isinstance(other, dict):
        return "not one of ours"
    options = [value["options"] if isinstance(value.get("options"), dict) else {} for value in (other, ours)]
    flat = [{**value, **own} for value, own in zip((other, ours), options, strict=True)]
    names = [name for name in {**flat[0], **flat[1]} if name != "options" and flat[0].get(name) != flat[1].get(name)]
    return "; ".join(
        "the input is not the same" if name == "pieces" else f"{name} {flat[0].get(name)!r}, now {flat[1].get(name)!r}"
        for name in names
    )


def _same_cut(other: object, ours: JsonObject) -> str:
    """What to do if two identities differ in the size of shards, whose default was another one in earlier releases."""
    size = other.get("samples_per_shard") if isinstance(other, dict) else None
    if size is None or {**ours, "samples_per_shard": size} != other:
        return ""
    return f". It is the same job with --samples-per-shard {size}"
