"""Mines hard negatives: from text pairs to triplets."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.curation import passes
from data_prep.curation.minhash import near_duplicates, signatures
from data_prep.curation.signature_store import SignatureStore, arrays_of
from data_prep.errors import UserError, needs
from data_prep.execute import Execution, Output, Target
from data_prep.negatives.guards import Guards, Known, choose
from data_prep.negatives.search import EXACT_UP_TO, build_index, search
from data_prep.shards import Dataset
from data_prep.shards.format import JsonObject

_SPARE = 50  # neighbours beyond the last rank, to replace those that are answers


@dataclass(frozen=True)
class Embedding:
    """How texts are embedded.

    model: a directory of a text tower, or of a model of ours with its `text/`. query_task, target_task: `task` of
    `TextTower.encode` for either side. dim: search by the first `dim` dims (Matryoshka), which takes less memory.
    """

    model: str
    query_task: str | None = None
    target_task: str | None = None
    dim: int | None = None


def mine_negatives(
    directories: Sequence[str],
    target: Target,
    embedding: Embedding,
    *,
    guards: Guards | None = None,
    similarity: float = 0.8,
    exact_up_to: int = EXACT_UP_TO,
    execution: Execution | None = None,
) -> JsonObject | None:
    """Write text pairs to `target` as triplets with hard negatives.

    Of a pair the first query is embedded, and the first target that differs from it. The negatives of a query are
    targets of other pairs, with all their alternatives. A pair with too few negatives is dropped.

    Args:
        similarity: texts with this estimated Jaccard similarity or more count as the same query or answer.
        exact_up_to: up to so many pairs the search is exact; for more it uses inverted lists.

    Raises:
        UserError: a number that makes no sense, no text pairs, no such model, or a library is not installed.
    """
    guards = guards or Guards()
    if not 0 < similarity <= 1 or exact_up_to < 0:
        raise UserError(
            f"--similarity {similarity}, --exact-up-to {exact_up_to}: expected above 0 and up to 1, and 0 or more"
        )
    if embedding.dim is not None and embedding.dim < 1:
        raise UserError(f"--dim {embedding.dim}: expected at least 1")
    datasets = passes.open_alike(directories)
    if datasets[0].kind != "text-pairs":
        raise UserError(f"{datasets[0].directory} holds {datasets[0].kind}; expected text-pairs")
    encoding = {**asdict(embedding), "model": str(_text_folder(Path(embedding.model)).resolve())}
    survey = passes.Survey(target, f"{__name__}:embed", passes.pieces_of(datasets), encoding)
    rules = {
        **encoding,
        **asdict(guards),
        "similarity": similarity,
        "exact_up_to": exact_up_to,
        "datasets": [str(dataset.directory.resolve()) for dataset in datasets],
    }
    job = passes.job_on(datasets, target, "negatives", f"{__name__}:compose", rules, survey)
    return passes.two_passes(survey, job, lambda done: _decide(done, guards, similarity, exact_up_to), execution)


def embed(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The survey: unit embeddings and MinHash signatures of query and target, and the item."""
    queries, targets, items = [], [], []
    for sample in passes.samples_of(piece):
        output.came_in()
        query, alternatives = (sample.content[side] for side in ("query", "target"))
        queries.append(query[0]["text"])
        # Names are equal in many languages: the first that differs from the query says more.
        targets.append(next((text["text"] for text in alternatives if text["text"] != queries[-1]), queries[-1]))
        item = f"{sample.content.get('source')}:{sample.content.get('item', sample.row.key)}"
        items.append(int.from_bytes(hashlib.sha256(item.encode("utf-8", "replace")).digest()[:8], "big"))
    tower = _tower(options["model"])
    sides: dict[str, np.ndarray] = {}
    for side, texts in (("query", queries), ("target", targets)):
        try:
            rows = tower.encode(texts, task=options[f"{side}_task"], truncate_dim=options["dim"])
        except ValueError as error:
            raise UserError(f"{options['model']}: {error}") from error
        sides |= {side: rows.astype(np.float16), **arrays_of(side, signatures(texts))}
    passes.save(Path(piece["survey"]), items=np.array(items, np.uint64), **sides)


def compose(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The rewriting pass: each pair with the targets that were chosen for it."""
    corpus = _corpus(tuple(options["datasets"]))
    for sample, chosen in zip(passes.samples_of(piece), passes.decision(piece).tolist(), strict=True):
        output.came_in()
        if chosen[0] < 0:
            output.drop(f"fewer than {options['count']} negatives passed the guards", sample.row.key)
            continue
        sample.content["negatives"] = [corpus.target(pair) for pair in chosen]
        passes.write(output, piece, sample, kind="text-triplets", tokens=None)


def _decide(survey: passes.Survey, guards: Guards, similarity: float, exact_up_to: int) -> Iterator[np.ndarray]:
    files = survey.files()
    known = Known(
        query=_groups(files, "query", similarity),
        answer=_groups(files, "target", similarity),
        item=np.unique(np.concatenate([passes.load(file, "items")["items"] for file in files]), return_inverse=True)[1],
    )
    index = build_index(
        lambda: (passes.load(file, "target")["target"] for file in files), len(known.query), exact_up_to=exact_up_to
    )
    answers_of, first = known.answers_of(), 0
    for file in files:
        part = passes.load(file, "query", "target")
        scores, neighbours = search(index, part["query"], guards.ranks[1] + _SPARE)
        positives = (part["query"].astype(np.float32) * part["target"].astype(np.float32)).sum(axis=1)
        yield choose(neighbours, scores, positives, first, known, answers_of, guards)
        first += len(positives)


def _groups(files: Sequence[Path], side: str, similarity: float) -> np.ndarray:
    with SignatureStore(files, side) as stored:
        return near_duplicates(stored, similarity=similarity)


class _Corpus:
    """The targets of all pairs, by the numbers of the survey."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._datasets = [Dataset.open(directory) for directory in directories]
        self._begins = np.cumsum([0, *(len(dataset) for dataset in self._datasets)])

    def target(self, pair: int) -> list[passes.TextDict]:
        number = int(np.searchsorted(self._begins, pair, "right")) - 1
        sample = passes.sample_at(self._datasets[number], pair - int(self._begins[number]))
        return sample.texts[1]


_corpus = functools.lru_cache(1)(_Corpus)


def _text_folder(model: Path) -> Path:
    folder = model / "text" if (model / "text").is_dir() else model
    if not (folder / "config.json").exists():
        raise UserError(f"{model} holds no text tower: there is no {folder / 'config.json'}; export a model first")
    return folder


@functools.lru_cache(1)
def _tower(folder: str) -> Any:
    needs("text_tower", extra="models", what="mining negatives")
    from text_tower import TextTower

    try:
        return TextTower.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot load {folder}: {error}") from error
