"""Identifies the language of unlabelled texts and drops texts whose label is clearly wrong."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.curation.language_id import MIN_LETTERS, identify, letters
from data_prep.curation.passes import TextDict, job_on, open_alike, samples_of, write
from data_prep.errors import UserError
from data_prep.execute import Execution, Output, Target, run_job
from data_prep.languages import LANGUAGES, house_language
from data_prep.shards.format import JsonObject

SURE = 0.9


def relabel(
    directories: Sequence[str],
    target: Target,
    *,
    sure: float = SURE,
    without: Sequence[str] = (),
    execution: Execution | None = None,
) -> JsonObject | None:
    """Write the data sets to `target` with every text's language known.

    A text without a label ("und") gets the identified language if the probability is at least `sure`, and is removed
    otherwise, as are texts in none of the thirty languages. A text whose label is another of the thirty than the
    identified one, with that probability, is removed; labels of texts with fewer than `MIN_LETTERS` letters are kept.
    Texts in a language of `without` are removed. A sample without captions, query or target is dropped, and so is a
    triplet that lost a negative.
    """
    if not 0 < sure <= 1:
        raise UserError(f"--sure {sure}: expected a probability above 0 and up to 1")
    without = [house_language(code) for code in without]
    if strangers := [code for code in without if code not in LANGUAGES]:
        raise UserError(
            f"--without {' '.join(strangers)}: expected codes of the thirty languages, {' '.join(LANGUAGES)}"
        )
    datasets = open_alike(directories)
    rules = {"sure": sure, "without": sorted(without)}
    return run_job(job_on(datasets, target, "languages", f"{__name__}:check", rules), execution)


def check(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The work of a unit."""
    for sample in samples_of(piece):
        output.came_in()
        place, words = f"{piece['dataset']}: {sample.row.key}", sample.words
        taken_out = False
        for texts in sample.texts:
            judged = [_language_of(text, options["sure"]) for text in texts]
            judged = [
                (None, "in a language to be left out") if of in options["without"] else (of, why) for of, why in judged
            ]
            for text, (language, why) in zip(texts, judged, strict=True):
                if language is None:
                    output.note(f"texts out: {why}")
                    output.mention(f"text out: {why}", place, content=f"{text['language']}: {text['text']}")
                    taken_out = True
                elif text["language"] != language:
                    output.note("texts that got a language")
                    text["language"] = language
            texts[:] = [text for text, (language, _) in zip(texts, judged, strict=True) if language is not None]
        if all(sample.texts):
            write(
                output, piece, sample, tokens=None if taken_out else sample.row.tokens
            )  # the longest text may be gone
        else:
            output.drop("no text in a language that is known for sure", place, content=words)


def _language_of(text: TextDict, sure: float) -> tuple[str | None, str]:
    """(its language, "") or (None, why it is removed)."""
    said = house_language(text["language"])
    if said in LANGUAGES and letters(text["text"]) < MIN_LETTERS:
        return said, ""
    if said not in LANGUAGES and said != "und":
        return None, "a language that is none of the thirty"
    found, probability = identify(text["text"], among_all=said == "und")
    if said == "und":
        if found in LANGUAGES and probability >= sure:
            return found, ""
        return None, "not in one of the thirty languages, or not for sure"
    if found != said and probability >= sure:
        return None, "clearly in another language than said"
    return said, ""
