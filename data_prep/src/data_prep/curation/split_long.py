"""Moves captions with more tokens than stage 1 reads to the long set, for stages 2 and 3."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from data_prep.curation.passes import open_alike, pieces_of, samples_of, write
from data_prep.curation.tokens import TokenCounter
from data_prep.errors import UserError
from data_prep.execute import Execution, Job, Output, Target, run_job
from data_prep.shards.format import JsonObject

LONGEST = 256  # tokens of a short caption, as in the paper
_KINDS = ("image-short", "image-long")


def split_long(
    directories: Sequence[str],
    target: Target,
    *,
    tokenizer: str,
    longest: int = LONGEST,
    execution: Execution | None = None,
) -> JsonObject | None:
    """Count the tokens of every caption, and write those of up to `longest` as OUT/image-short/NAME, the others as
    OUT/image-long/NAME. An image with both kinds goes to both. `<s>` and `</s>` count.
    """
    if longest < 1:
        raise UserError(f"--longest {longest}: expected at least 1")
    datasets = [dataset for directory in directories for dataset in open_alike([directory])]
    for dataset in datasets:
        if dataset.kind not in _KINDS:
            raise UserError(f"{dataset.directory} holds {dataset.kind}; expected images with captions")
    counter = TokenCounter(tokenizer)
    job = Job(
        title="split-long",
        target=target,
        work=f"{__name__}:split",
        pieces=pieces_of(datasets),
        options={"tokenizer": str(counter.path.resolve()), "sha256": counter.sha256, "longest": longest},
        tokenizer_sha256=counter.sha256,
    )
    return run_job(job, execution)


def split(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The work of a unit."""
    counter = _counter(options["tokenizer"], options["sha256"])
    for sample in samples_of(piece):
        output.came_in()
        captions = sample.content["captions"]
        counts = counter.counts([caption["text"] for caption in captions])
        for kind, wanted in zip(_KINDS, (False, True), strict=True):
            chosen = [place for place, count in enumerate(counts) if (count > options["longest"]) == wanted]
            if not chosen:
                continue
            output.note(f"captions in {kind}", len(chosen))
            write(
                output,
                piece,
                replace(sample, content={**sample.content, "captions": [captions[place] for place in chosen]}),
                kind=kind,
                tokens=max(counts[place] for place in chosen),
            )
        if not captions:
            output.drop("no caption", f"{piece['dataset']}: {sample.row.key}")


@functools.lru_cache(1)
def _counter(path: str, sha256: str) -> TokenCounter:
    counter = TokenCounter(path)
    if counter.sha256 != sha256:
        raise UserError(f"{path} changed while it was used; run the command again")
    return counter
