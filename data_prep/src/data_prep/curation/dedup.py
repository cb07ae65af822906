"""Removes exact duplicates, near-duplicates, and whatever an evaluation set holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.curation import image_duplicates, passes, text_duplicates, text_sets
from data_prep.curation.verdicts import BROKEN, KEPT, REASONS, Verdicts
from data_prep.errors import UserError
from data_prep.execute import Execution, Output, Target
from data_prep.shards.format import IMAGE_TRIPLETS, JsonObject

_SHOWN = 20  # pairs for each reason that a dry run prints


def deduplicate(
    directories: Sequence[str],
    target: Target,
    *,
    against: Sequence[str] = (),
    similarity: float = 0.8,
    distance: int = 4,
    near: bool = True,
    dry_run: bool = False,
    execution: Execution | None = None,
) -> JsonObject | None:
    """Write the data sets to `target` without duplicates, of which the first stays.

    Samples with images are compared by image; the one that stays takes over the others' captions. Text pairs and
    triplets are compared by all their queries and targets. A sample is also removed if its image, or a text that says
    enough (`text_duplicates.TELLING`), is nearly one of `against`. What goes is compared with what it falls to, by
    pixels or exact similarity, and named with it.

    Args:
        against: evaluation sets: data sets of the same kind, or sets of texts of `data-prep evalset beir` and `sts`.
        similarity: texts with this Jaccard similarity or more are near-duplicates.
        distance: images whose perceptual hashes differ in at most so many bits, and that have the same colours in the
            same places and nearly the same pixels, are near-duplicates.
        near: False: remove exact duplicates only.
        dry_run: print what would go, and write nothing but the survey, with which the next run goes on.
    """
    if not 0 <= distance <= 15 or not 0 < similarity <= 1:
        raise UserError("--distance is from 0 to 15 bits and --similarity above 0 and up to 1")
    datasets = passes.open_alike(directories)
    tests = passes.open_alike(text_sets.as_data_sets(against, target)) if against else []
    images = datasets[0].kind.startswith("image")
    if datasets[0].kind == IMAGE_TRIPLETS:
        raise UserError(
            f"{datasets[0].directory} holds {IMAGE_TRIPLETS}, and captions of equal images cannot be put together: a "
            "hard negative of one may be what another describes. Remove duplicates from the table, and import it again"
        )
    if tests and tests[0].kind.startswith("image") != images:
        raise UserError(
            f"{tests[0].directory} holds {tests[0].kind}; {datasets[0].kind} can only be compared with its kind"
        )
    before = passes.pieces_of(tests)
    pieces = [*before, *passes.pieces_of(datasets)]
    signing = image_duplicates if images else text_duplicates
    survey = passes.Survey(target, f"{signing.__name__}:sign", pieces, {"version": 3, "sides": bool(tests)})
    numbered = [str(dataset.directory.resolve()) for dataset in [*tests, *datasets]]
    rules = {
        "similarity": similarity, "distance": distance, "near": near,
        "against": [test.fingerprint for test in tests], "numbered": numbered,
    }  # fmt: skip
    job = passes.job_on(datasets, target, "dedup", f"{__name__}:drop", rules, survey)

    def decide(survey: passes.Survey) -> tuple[Verdicts, list[int]]:
        samples = passes.Numbered(numbered)
        if images:
            return image_duplicates.decide(survey.files(), len(before), distance if near else -1, samples)
        return text_duplicates.decide(survey.files(), len(before), similarity, near, samples)

    if dry_run:
        if survey.run(execution or Execution()):
            _show(decide(survey)[0], passes.Numbered(numbered))
        return None

    def decided(survey: passes.Survey) -> Iterator[dict[str, np.ndarray]]:
        verdicts, sizes = decide(survey)
        return verdicts.parts(sizes)

    return passes.two_passes(survey, job, decided, execution)


def drop(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The rewriting pass."""
    numbered, decided = passes.numbered(tuple(options["numbered"])), passes.decision(piece)
    taken: dict[int, list[int]] = {}
    for place, number in decided["taken"].tolist():
        taken.setdefault(place, []).append(number)
    verdicts = zip(decided["values"].tolist(), decided["to"].tolist(), strict=True)
    for place, (sample, (what, to)) in enumerate(zip(passes.samples_of(piece), verdicts, strict=True)):
        output.came_in()
        if what != KEPT:
            other = "" if what == BROKEN else f", like {numbered.name(to)}"
            output.drop(REASONS[what], f"{piece['dataset']}: {sample.row.key}{other}", content=sample.words)
        elif place in taken and sample.kind.startswith("image"):
            _take_over(sample, [numbered.sample(number) for number in taken[place]], piece, output)
        else:
            passes.copy(output, piece, sample)


def _take_over(sample: passes.Sample, others: Sequence[passes.Sample], piece: JsonObject, output: Output) -> None:
    """Write a sample with the captions of others that have the same image."""
    captions = sample.content["captions"]
    known = {(caption["language"], caption["text"]) for caption in captions}
    before, tokens = len(captions), [sample.row.tokens]
    for other in others:
        for caption in other.content["captions"]:
            if (caption["language"], caption["text"]) not in known:
                known.add((caption["language"], caption["text"]))
                captions.append(caption)
                tokens.append(other.row.tokens)
    if len(captions) == before:
        passes.copy(output, piece, sample)
        return
    output.note("captions that the first of the same images took over", len(captions) - before)
    counts = [count for count in tokens if count is not None]
    passes.write(output, piece, sample, tokens=max(counts) if len(counts) == len(tokens) else None)


def _show(verdicts: Verdicts, samples: passes.Numbered) -> None:
    """Print the samples that would go, each with the one that it falls to."""
    ours = verdicts.what[verdicts.begin :]
    for what, reason in REASONS.items():
        places = np.flatnonzero(ours == what) + verdicts.begin
        if not len(places):
            continue
        print(f"{reason}: {len(places)}" + (f", of which {_SHOWN}" if len(places) > _SHOWN else ""))
        for place in places[:_SHOWN].tolist():
            other = "" if what == BROKEN else f"\n    like {samples.name(int(verdicts.to[place]))}"
            print(f"  {samples.name(place)}{other}")
    print(f"{int((ours == KEPT).sum())} of {len(ours)} would stay; run again without --dry-run to write them")
