"""A job from its inputs to the file of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.shards import alone
from tqdm import tqdm

from stage_trainer.bulk import vectors
from stage_trainer.bulk.encoder import EncoderSettings
from stage_trainer.bulk.entries import Entry, Input, name_of
from stage_trainer.bulk.parts import Part, Parts, digest_of
from stage_trainer.bulk.processes import Done, Task, encode_all
from stage_trainer.bulk.statement import Statement, as_stated
from stage_trainer.bulk.stored import Stored, ranges_in, ranges_of_blocks
from stage_trainer.errors import UserError
from stage_trainer.files import fingerprint_of, model_digests, writing
from stage_trainer.metrics.quantization import FEW, SCALARS

_TEXTS = 4096  # of a part; an image counts as sixteen
_BYTES = 64 * 2**20  # of a part's images that are no files


@dataclass(frozen=True)
class Job:
    """What is encoded, by what, and where it goes.

    Args:
        devices: one for each process.
        skipping: leave out what cannot be encoded, and list it.
    """

    inputs: list[Input]
    out: Path
    settings: EncoderSettings
    devices: list[str]
    skipping: bool


def run(job: Job, say: Callable[[str], None]) -> tuple[int, int]:
    """Encodes, or goes on where the same job was before; returns (vectors, entries left out).

    Raises:
        UserError: nothing to encode; an entry that cannot be encoded, unless they are skipped; what a disk, a GPU or a
            process says. Finished parts stay in each case.
    """
    parts = Parts(job.out)
    with ExitStack() as stack:
        with writing(job.out):
            lock = job.out.with_name(f".{job.out.name}.lock")
            stack.enter_context(alone(lock, f"{job.out} is being written: it"))
        asked = _asked(job.settings)
        names = _encode(job, parts, say)

        def stored() -> Iterator[Part]:
            for name in names:
                if (part := parts.read(name)) is None:
                    raise UserError(f"{parts.folder} has lost a part since it was written; run the same command again")
                yield part

        statement = _whole(asked, stored, say)
        found = vectors.write(job.out, stored, parts.folder, statement, skipping=job.skipping)
        parts.remove()
    return found


def _asked(settings: EncoderSettings) -> Statement:
    """What is known of the file before anything is encoded: all but its dims, and ranges that nothing was asked for.

    Raises:
        UserError: the calibration vectors cannot be read, or were made differently.
    """
    options = settings.options
    calibration = None if settings.calibration is None else Stored(settings.calibration)
    dims = options.get("truncate_dim") or (0 if calibration is None else calibration.statement.dims)
    asked = Statement(
        fingerprint_of(settings.model), dims, settings.precision, options.get("normalize", True), options.get("task")
    )
    if calibration is None:
        return asked
    return replace(asked, ranges=as_stated(ranges_in(calibration, asked)))


def _whole(asked: Statement, parts: Callable[[], Iterator[Part]], say: Callable[[str], None]) -> Statement:
    """The statement, with the vectors' dims, and with their own ranges where there are none yet.

    Raises:
        UserError: they have no ranges.
    """
    first = next(parts())
    found = replace(asked, dims=first.vectors.shape[1])
    if asked.precision not in SCALARS:
        return found
    if asked.ranges is not None:
        if asked.dims != found.dims:
            raise UserError(f"--calibration has vectors of {asked.dims} dims, and these have {found.dims}")
        return found
    if (count := sum(len(part.ids) for part in parts())) < FEW:
        say(f"the ranges of {count:,} vectors are a poor guess of others'; --calibration takes those of more")
    return replace(found, ranges=as_stated(ranges_of_blocks(part.vectors for part in parts())))


def _encode(job: Job, parts: Parts, say: Callable[[str], None]) -> list[str]:
    """Stores every part that is not stored yet; the names of all of them, in order."""
    key = key_of(job.settings)
    counts = [each.count() for each in job.inputs]
    total = None if None in counts else sum(filter(None, counts))
    names: list[str] = []

    with tqdm(total=total, desc="encoding", unit="input", mininterval=0.5) as progress:

        def missing() -> Iterator[Task]:
            start = before = 0
            for entries in chunks(entry for each in job.inputs for entry in each):
                names.append(digest_of(key, entries))
                if (stored := parts.read(names[-1])) is not None and (job.skipping or not stored.left_out):
                    before += len(entries)
                    progress.update(len(entries))
                elif job.skipping:
                    yield Task(start, names[-1], entries)
                else:
                    _refuse_faults(start, entries)
                    yield Task(start, names[-1], entries)
                start += len(entries)
            if before:
                say(f"{before:,} of {start:,} were encoded before")

        for done in encode_all(missing(), job.settings, parts, job.devices, skipping=job.skipping):
            _refuse(done)
            progress.update(len(done.task.entries))
    if not names:
        raise UserError("there is nothing to encode: the inputs are empty")
    if others := parts.others(set(names)):
        say(f"{others} parts in {parts.folder} are of other inputs, options or another model; they are not used")
    return names


def chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Parts of a size that is lost at most when a process is killed, by the entries alone: a resume finds the same."""
    chunk: list[Entry] = []
    cost = size = 0
    for entry in entries:
        chunk.append(entry)
        cost += 16 if entry.kind == "image" else 1
        size += len(entry.value) if isinstance(entry.value, bytes) else 0
        if cost >= _TEXTS or size >= _BYTES:
            yield chunk
            chunk, cost, size = [], 0, 0
    if chunk:
        yield chunk


def key_of(settings: EncoderSettings) -> str:
    """What vectors follow from, apart from the inputs: the model's files, and options."""
    options = {name: value for name, value in settings.options.items() if name not in ("batch_size", "threads")}
    return json.dumps([model_digests(settings.model), options], sort_keys=True)


def _refuse_faults(start: int, entries: list[Entry]) -> None:
    for place, entry in enumerate(entries):
        if entry.value is None:
            raise _bad(start + place, name_of(entry), entry.fault)


def _refuse(done: Done) -> None:
    if (bad := done.refused) is not None:
        raise _bad(done.task.start + bad.place, bad.name, bad.reason)


def _bad(index: int, name: str, reason: str) -> UserError:
    told = reason if reason.startswith(name) else f"{name}: {reason}"
    return UserError(
        f"inputs[{index}]: {told}. Mend or remove it, or leave out what cannot be encoded and have it listed: "
        "--errors skip. What is done stays"
    )
