"""The names of what is measured on held-out data, as TensorBoard shows them and `checkpoint.best` takes them.

They depend on the data sets' sources and languages, which manifests and indexes tell. Imports nothing heavy, so that a
wrong one is refused at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from pathlib import Path

from data_prep.shards import MANIFEST, Dataset, ShardError

from stage_trainer.data.config import DataConfig
from stage_trainer.data.remote_data import place
from stage_trainer.errors import UserError
from stage_trainer.evaluation.sets import captions_of
from stage_trainer.metrics.measure import Measure
from stage_trainer.recipe import Recipe, Stage
from stage_trainer.recipe.address import is_remote

MASKED_LM = "validation_loss_masked_lm"


def name_beside(taken: Container[str], source: str, kind: str, path: str) -> str:
    """The name of a data set beside others: its source, or what tells it from one of the same source."""
    return next(name for name in (source, f"{source}-{kind}", path) if name not in taken)


def of_images(
    name: str,
    in_languages: Collection[str],
    dims: Sequence[int],
    width: int | None,
    *,
    documents: bool,
    source: str = "",
) -> dict[str, Measure]:
    """What is measured of a pool of captioned images.

    Args:
        in_languages: of its captions.
        dims, width: Matryoshka dims, of which the whole width has no name of its own.
        documents: whether the images are pages, and the captions queries that they answer.
        source: of the pool; one of a published set is also measured as published figures are.
    """
    languages: dict[str, Collection[str]] = dict.fromkeys(("text→image", "image→text"), in_languages)
    if "en" in in_languages and (others := [language for language in in_languages if language != "en"]):
        languages["text→English text"] = others
    kinds = [("recall", languages)]
    if documents:
        kinds.append(("ndcg", {"text→image": in_languages}))
    found: dict[str, Measure] = {}
    for measure, by_direction in kinds:
        for direction, of in by_direction.items():
            title = title_of(measure, name, direction)
            found[title] = Measure(headline=True)
            found |= {f"{title}/{language}": Measure() for language in of}
            found |= {f"{title}/{dim} dims": Measure() for dim in dims if dim != width}
    if captions_of(source, in_languages):
        published = by_published_protocol(name)
        found |= {title_of("recall", published, way): Measure(headline=True) for way in ("text→image", "image→text")}
    return {**found, f"modality_gap/{name}": Measure(higher_is_better=False)}


def of_pairs(name: str, in_languages: Collection[str], *, scored: bool) -> dict[str, Measure]:
    """What is measured of a pool of text pairs, by the queries' language; with people's scores, if they have them."""
    found = {title_of_pairs(name, f"ndcg_at_10/{language}"): Measure() for language in in_languages}
    if in_languages:
        found[title_of_pairs(name, "ndcg_at_10/mean")] = Measure(headline=True)
    if scored:
        found[title_of_pairs(name, "spearman")] = Measure(headline=True)
    return found


def of_masked_lm(in_languages: Collection[str]) -> dict[str, Measure]:
    """What is measured of texts with hidden words."""
    found = {f"{MASKED_LM}/{language}": Measure(higher_is_better=False) for language in in_languages}
    return {**found, f"{MASKED_LM}/all": Measure(higher_is_better=False, headline=True)}


def title_of(measure: str, pool: str, direction: str) -> str:
    return f"validation_{measure}_at_5_{pool}/{direction.replace('→', ' to ')}"


def by_published_protocol(pool: str) -> str:
    """What stands for a pool in the names of recall@5 by the protocol of published figures, CLIP_benchmark's: the mean
    over the set's languages, as `evaluate --suite` has it. In our own, equal captions count once, and all languages of
    the pool are in the mean."""
    return f"{pool}, by CLIP_benchmark"


def title_of_pairs(pool: str, what: str) -> str:
    measure, _, language = what.partition("/")
    return f"validation_{measure}_{pool}/{language or 'all'}"


def check_best(metric: str | None, measures: Mapping[str, Measure] | None) -> None:
    """Checks before the first step that `checkpoint.best` names something that will be measured.

    Raises:
        UserError: it does not; the message names the closest ones.
    """
    if metric is None or (measures and metric in measures):
        return
    near = difflib.get_close_matches(metric, measures or (), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"what is: {', '.join(sorted(measures or ()))}"
    raise UserError(
        f"checkpoint.best is {metric!r}, which nothing measures; "
        + (hint if measures else "there are no held-out data for this stage, so leave it out")
    )


def check_best_of(recipe: Recipe, numbers: Iterable[int]) -> None:
    """Checks `checkpoint.best` for some stages (from 1), from manifests and indexes alone.

    What also depends on what the samples hold, such as whether captions are queries, is taken for possible here. Of
    data that are not on this machine nothing is known, and nothing is refused.

    Raises:
        UserError: no name is measured like that; the message names the closest ones. A data set is damaged.
    """
    if recipe.checkpoint.best is None:
        return
    found: dict[str, Measure] = {}
    for number in numbers:
        try:
            of_stage = _possible(recipe, number)
        except (ShardError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        if of_stage is None:
            return
        found |= of_stage
    check_best(recipe.checkpoint.best, found)


_OF_OWN = {"masked_lm": of_masked_lm}
"""What kinds of stages measure of their own held-out texts in these languages, by `Kind.task`."""


def _possible(recipe: Recipe, number: int) -> dict[str, Measure] | None:
    """What a stage may measure; None if that is not known here."""
    stage, data = recipe.stage(number), DataConfig.of(recipe)
    if stage.kind.own_held_out:
        return _possible_of_own(data, stage)
    here = _held_out_here(data, recipe.evaluation.pools)
    if len(here) < len(recipe.evaluation.pools):
        return None
    names: dict[bool, set[str]] = {True: set(), False: set()}
    found: dict[str, Measure] = {}
    for path, opened in here.items():
        images = opened.kind.startswith("image-")
        name = name_beside(names[images], opened.source, opened.kind, path)
        names[images].add(name)
        languages = _languages(opened)
        if images:
            found |= of_images(name, languages, stage.loss.dims, None, documents=True, source=opened.source)
        else:
            found |= of_pairs(name, languages, scored=True)
    return found


def _possible_of_own(data: DataConfig, stage: Stage) -> dict[str, Measure] | None:
    """`_possible` of the texts that the stage trains on, whose data sets may have no validation split."""
    paths: Sequence[str] = getattr(stage.data, stage.kind.task)
    if here := _held_out_here(data, paths):
        return _OF_OWN[stage.kind.task]({language for opened in here.values() for language in _languages(opened)})
    trained = [place(data, "train", path) for path in paths if not is_remote(path)]  # a URL has no splits
    return {} if all(isinstance(p, Path) and p.is_dir() for p in trained) else None


def _held_out_here(data: DataConfig, paths: Iterable[str]) -> dict[str, Dataset]:
    """By path, what of the validation split is on this machine."""
    places = [(path, place(data, "validation", path)) for path in paths]
    return {path: Dataset.open(p) for path, p in places if isinstance(p, Path) and (p / MANIFEST).exists()}


def _languages(data: Dataset) -> set[str]:
    return {language for number in range(len(data)) for language in data.row(number).languages}
