"""Measures models on evaluation sets, one after another; what is done is kept, so an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stage_trainer.errors import UserError
from stage_trainer.evaluation import classification, cross_modal, documents, text_sets
from stage_trainer.evaluation.measured import Key, Measured, data_fingerprint, file_of, keep, kept
from stage_trainer.evaluation.models import Embedder
from stage_trainer.evaluation.paper import CLASSIFICATION, SUITES, Table, of_classes, tables
from stage_trainer.evaluation.sets import SETS, EvalSet, known_as
from stage_trainer.recipe.limits import MAX_PIXELS

_MADE_BY = {
    "Flickr30K": "flickr30k", "MS COCO": "coco", "Crossmodal-3600": "xm3600", "multilingual MS COCO": "xtd10",
    "pages": "vidore", "retrieval": "beir", "pairs": "sts",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A model's figures. gaps: set → why it has none."""

    name: str
    dims: tuple[int, ...]
    fingerprint: str
    settings: dict[str, str]
    sets: dict[str, Measured]
    gaps: dict[str, str]


def asked_tables(suite: str | None, number: str | None, found: Mapping[str, Path]) -> list[Table]:
    """The tables of a suite ("all" for every one), or the one of that number.

    Args:
        found: the sets that there are; those of labelled images have no names of their own.

    Raises:
        UserError: there is no such table.
    """
    every = tables() | {CLASSIFICATION: _of_classes(found)}
    if number is not None:
        if number not in every:
            raise UserError(f"--table {number}: there is no such table of figures; there are {', '.join(every)}")
        return [every[number]]
    return list(every.values()) if suite in (None, "all") else [every[name] for name in SUITES[str(suite)]]


def _of_classes(found: Mapping[str, Path]) -> Table:
    sets = {name: classification.languages_of(folder) for name, folder in found.items() if name not in SETS}
    return of_classes(sets, (classification.FIRST, classification.FIVE, classification.BY_CLASS))


def measure(
    model: Embedder,
    names: Iterable[str],
    found: Mapping[str, Path],
    out: Path,
    say: Callable[[str], None],
    max_pixels: int = MAX_PIXELS,
) -> Column:
    """A model's figures on some sets; those that are kept in `out` for the same weights, data and settings are taken.

    Args:
        names: of sets, as in `SETS`; found: their folders. Those without one are gaps.

    Raises:
        UserError: a set cannot be read, or the model's embeddings cannot be ranked by.
            What was measured before is kept.
    """
    sets: dict[str, Measured] = {}
    gaps: dict[str, str] = {}
    for name in names:
        known = known_as(name)
        if name not in found:
            made = _MADE_BY.get(name) or _MADE_BY[known.kind]
            gaps[name] = f"not among the data; `data-prep evalset {made}` makes it"
        elif known.kind in ("captions", "pages", "classes") and not model.sees:
            gaps[name] = f"{model.name} has no image tower"
        else:
            key = Key(model.fingerprint, data_fingerprint(found[name]), model.settings)
            path = file_of(out, model.name, known)
            before, why = kept(path, key)
            if before is not None:
                say(f"{name}: measured before, {path}")
            else:
                say(f"{name}: {f'measured anew, since {why}' if why else 'measuring'} …")
                before = _measured(model, known, found[name], say, max_pixels)
                keep(path, key, before, set=name, folder=str(found[name]), column=model.name)
            sets[name] = before
    return Column(model.name, model.dims, model.fingerprint, model.settings, sets, gaps)


def _measured(model: Embedder, known: EvalSet, folder: Path, say: Callable[[str], None], max_pixels: int) -> Measured:
    if known.kind == "classes":
        return classification.measure(model, known, folder, max_pixels)
    if known.kind == "captions":
        return cross_modal.measure(model, known, folder, max_pixels)
    if known.kind == "pages":
        return documents.measure(model, known, folder, max_pixels)
    if known.kind == "retrieval":
        return text_sets.measure_retrieval(model, known, folder, say)
    return text_sets.measure_pairs(model, known, folder)
