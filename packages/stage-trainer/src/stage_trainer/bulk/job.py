"""A job from its inputs to the file of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import alone
from tqdm import tqdm

from stage_trainer.bulk import vectors
from stage_trainer.bulk.encoder import EncoderSettings
from stage_trainer.bulk.entries import Entry, Input, name_of
from stage_trainer.bulk.parts import Part, Parts, digest_of
from stage_trainer.bulk.processes import Done, Task, encode_all
from stage_trainer.errors import UserError
from stage_trainer.files import model_digests, writing

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
        names = _encode(job, parts, say)

        def stored() -> Iterator[Part]:
            for name in names:
                if (part := parts.read(name)) is None:
                    raise UserError(f"{parts.folder} has lost a part since it was written; run the same command again")
                yield part

        found = vectors.write(job.out, stored, parts.folder, skipping=job.skipping)
        parts.remove()
    return found


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
