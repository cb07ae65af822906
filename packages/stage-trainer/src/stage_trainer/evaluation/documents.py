"""Pages that answer queries: ViDoRe's three versions.

Version 1 has questions that were asked of several pages. Both of its evaluators ask such a question once, but judge it
differently: in mteb (`NDCG_5` here) all of its pages are right, in vidore-benchmark (`LAST_PAGE`) the last one alone.
Versions 2 and 3 go by the queries' ids and have grades; 2 takes the best five pages, 3 the best ten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from data_prep.shards import ShardError
from vision_tower.preprocess import check_image

from stage_trainer.data.remote_data import open_place
from stage_trainer.data.samples import image_of, shard_errors_explained, texts_of
from stage_trainer.errors import UserError
from stage_trainer.evaluation.measured import Figures, Measured, compared, compared_by_language
from stage_trainer.evaluation.models import Embedder
from stage_trainer.evaluation.sets import V1, V2, EvalSet
from stage_trainer.metrics.ranking import Best, ndcg
from stage_trainer.metrics.retrieval import unit
from stage_trainer.recipe.limits import MAX_PIXELS

NDCG_5, NDCG_10 = "nDCG@5", "nDCG@10"
LAST_PAGE = "nDCG@5, of a repeated question the last page alone"


@dataclass
class Query:
    """A question, and what its pages are worth: page number → grade."""

    text: str
    grades: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pages:
    """A benchmark: encoded pages with their ids, and queries by language and id."""

    images: list[bytes]
    ids: list[str]
    queries: dict[str, dict[str, Query]]

    @classmethod
    @shard_errors_explained()
    def open(cls, directory: Path, max_pixels: int = MAX_PIXELS) -> Pages:
        """Reads what `data-prep evalset vidore` wrote.

        Raises:
            UserError: the data set is missing or damaged, or no page has a query.
            ImageError: an image that its header shows to be none, or to have more than `max_pixels`.
        """
        data = open_place(directory)
        images, ids = [], []
        queries: dict[str, dict[str, Query]] = {}
        for number in range(len(data)):
            members = data.read(number)
            image, content = image_of(members), texts_of(data, number, members)
            if image is None or "captions" not in content:
                raise ShardError(f"{data.directory}: sample {data.row(number).key} is no page with queries")
            check_image(image, max_pixels=max_pixels, name=f"{data.directory}, sample {data.row(number).key}")
            images.append(image)
            ids.append(str(content["item"]))
            for text in content["captions"]:
                if text.get("role") == "query":
                    of = queries.setdefault(text["language"], {})
                    query = of.setdefault(str(text.get("id", text["text"])), Query(text["text"]))
                    query.grades[number] = _grade(text.get("score", 1), f"{data.directory}, page {ids[-1]}")
        if not queries:
            raise ShardError(f"{directory} has no page with a query; make it with `data-prep evalset vidore`")
        return cls(images, ids, dict(sorted(queries.items())))


def measure(model: Embedder, known: EvalSet, folder: Path, max_pixels: int = MAX_PIXELS) -> Measured:
    """nDCG of a benchmark's pages: of version 1 as one row in both readings, else by language and as their mean.

    Raises:
        UserError: it cannot be read, it has none of its languages, or the embeddings cannot be ranked by.
    """
    pages = Pages.open(folder, max_pixels)
    first = known.name in V1
    wanted = (
        {known.name: _together(pages)} if first else {k: v for k, v in pages.queries.items() if k in known.languages}
    )
    if not wanted:
        there, asked = ", ".join(pages.queries), ", ".join(known.languages)
        raise UserError(f"{folder} has queries in {there}; {known.name} is measured in {asked}")
    images = unit(model.embed_images(pages.images))
    figures: Figures = {}
    counts = {"pages": len(pages.images), "queries": sum(map(len, wanted.values()))}
    notes = compared(known, {"pages": len(pages.images)})
    notes += compared_by_language(known, "queries", {"" if first else row: len(of) for row, of in wanted.items()})
    for row, of in wanted.items():
        queries = list(of.values())
        texts = unit(model.embed_texts([query.text for query in queries], query=True))
        readings = {NDCG_5 if first or known.name in V2 else NDCG_10: [query.grades for query in queries]}
        if first:
            readings[LAST_PAGE] = [{last: query.grades[last]} for query in queries for last in [max(query.grades)]]
        for dim in model.dims:
            found = _ranked(texts[:, :dim], images[:, :dim], pages.ids)
            for measure, grades in readings.items():
                value = float(ndcg(found, grades, 10 if measure == NDCG_10 else 5).mean())
                figures.setdefault(measure, {}).setdefault(row, {})[str(dim)] = value
    whole = not notes
    if missing := [language for language in known.languages if language not in wanted]:
        notes.append(f"{known.name} has no queries in {', '.join(missing)} in {folder}")
    return Measured(figures, counts, tuple(notes), whole)


def _ranked(queries: np.ndarray, pages: np.ndarray, ids: list[str]) -> np.ndarray:
    """The numbers of the best ten pages of each query; equal scores as trec_eval orders ids."""
    import torch

    order = np.array(sorted(range(len(ids)), key=ids.__getitem__))
    found = Best(torch.from_numpy(unit(queries)), 10)
    found.add(torch.from_numpy(unit(pages[order])), torch.arange(len(ids)))
    ranks = found.ranks()
    return np.where(ranks < 0, -1, order[ranks])


def _together(pages: Pages) -> dict[str, Query]:
    """Version 1's questions by their text: one that several pages answer is one question."""
    found: dict[str, Query] = {}
    for query in _each(pages.queries.values()):
        own = found.setdefault(query.text, Query(query.text)).grades
        for page, grade in query.grades.items():
            own[page] = max(grade, own.get(page, 0.0))
    return found


def _each(languages: Iterable[dict[str, Query]]) -> Iterable[Query]:
    return (query for of in languages for query in of.values())


def _grade(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise ShardError(f"{where}: the grade of a query is {value!r}; expected a finite number above 0")
    return float(value)
