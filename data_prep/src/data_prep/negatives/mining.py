"""Mines hard negatives: from text pairs to triplets."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.curation import passes
from data_prep.curation.minhash import Comparison, Signed, alike_pairs, normalize_text, signatures
from data_prep.curation.signature_store import SignatureStore, arrays_of
from data_prep.errors import UserError, needs
from data_prep.execute import Execution, Output, Target
from data_prep.negatives.guards import Guards, Known, choose
from data_prep.negatives.search import EXACT_UP_TO, build_index, search
from data_prep.shards.format import JsonObject

_SPARE = 50  # neighbours beyond the last rank, to replace those that are answers
_FOUND_AT_A_TIME = 10_000_000  # neighbours of all queries of one search


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
    targets of other pairs, with all their alternatives, of which none is nearly an answer of a pair with nearly this
    query. A pair with too few negatives is dropped.

    Args:
        similarity: texts with this Jaccard similarity or more count as the same query or answer.
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
    encoding = {"version": 3, **asdict(embedding), "model": str(_text_folder(Path(embedding.model)).resolve())}
    survey = passes.Survey(target, f"{__name__}:embed", passes.pieces_of(datasets), encoding)
    rules = {
        **encoding,
        **asdict(guards),
        "similarity": similarity,
        "exact_up_to": exact_up_to,
        "datasets": [str(dataset.directory.resolve()) for dataset in datasets],
    }
    job = passes.job_on(datasets, target, "negatives", f"{__name__}:compose", rules, survey)
    samples = passes.Numbered(rules["datasets"])
    return passes.two_passes(
        survey, job, lambda done: _decide(done, guards, similarity, exact_up_to, samples), execution
    )


def embed(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The survey: unit embeddings of query and target, the item, and of all texts of either side a signature, a key and
    the pair that they belong to."""
    queries, targets, items = [], [], []
    sides: dict[str, list[list[str]]] = {"query": [], "target": []}
    for sample in passes.samples_of(piece):
        output.came_in()
        for side, own in sides.items():
            own.append([text["text"] for text in sample.content[side]])
        queries.append(sides["query"][-1][0])
        # Names are equal in many languages: the first that differs from the query says more.
        targets.append(next((text for text in sides["target"][-1] if text != queries[-1]), queries[-1]))
        items.append(_key(f"{sample.content.get('source')}:{sample.content.get('item', sample.row.item)}"))
    tower = _tower(options["model"])
    arrays: dict[str, np.ndarray] = {"items": np.array(items, np.uint64)}
    for side, texts, task in (("query", queries, "query_task"), ("target", targets, "target_task")):
        try:
            rows = tower.encode(texts, task=options[task], truncate_dim=options["dim"])
        except ValueError as error:
            raise UserError(f"{options['model']}: {error}") from error
        flat = [text for texts in sides[side] for text in texts]
        arrays |= {
            side: rows.astype(np.float16),
            f"{side}_keys": np.array([_key(normalize_text(text)) for text in flat], np.uint64),
            f"{side}_counts": np.array([len(texts) for texts in sides[side]], np.int64),
            **arrays_of(side, signatures(flat)),
        }
    passes.save(Path(piece["survey"]), **arrays)


def compose(piece: JsonObject, options: JsonObject, output: Output) -> None:
    """The rewriting pass: each pair with the targets that were chosen for it."""
    corpus = passes.numbered(tuple(options["datasets"]))
    decided = passes.decision(piece)
    rows = zip(passes.samples_of(piece), decided["values"].tolist(), decided["alternatives"].tolist(), strict=True)
    for sample, chosen, alternatives in rows:
        output.came_in()
        if chosen[0] < 0:
            place = f"{piece['dataset']}: {sample.row.key}"
            output.drop(f"fewer than {options['count']} negatives passed the guards", place, content=sample.words)
            continue
        sample.content["negatives"] = [
            [text for place, text in enumerate(corpus.sample(pair).texts[1]) if which >> place & 1]
            for pair, which in zip(chosen, alternatives, strict=True)
        ]
        passes.write(output, piece, sample, kind="text-triplets", tokens=None)


def _decide(
    survey: passes.Survey, guards: Guards, similarity: float, exact_up_to: int, samples: passes.Numbered
) -> Iterator[dict[str, np.ndarray]]:
    files = survey.files()
    with SignatureStore(files, "query") as asked, SignatureStore(files, "target") as answered:
        queries, answers = (_Side(files, side, samples) for side in ("query", "target"))
        known = Known(
            answers=answers.by_pair(),
            items=np.concatenate([passes.load(file, "items")["items"] for file in files]),
            right=_right(queries, answers, queries.neighbours(asked, similarity)),
            alike=_alike(queries, asked, answers, answered, similarity),
        )
        index = build_index(
            lambda: (passes.load(file, "target")["target"] for file in files), len(known.items), exact_up_to=exact_up_to
        )
        first = 0
        for file in files:
            part = passes.load(file, "query", "target")
            positives = (part["query"].astype(np.float32) * part["target"].astype(np.float32)).sum(axis=1)
            values, alternatives = _choose(index, part["query"], positives, first, known, guards)
            yield {"values": values, "alternatives": alternatives}
            first += len(positives)


def _choose(
    index: Any, queries: np.ndarray, positives: np.ndarray, first: int, known: Known, guards: Guards
) -> tuple[np.ndarray, np.ndarray]:
    """(the negatives of pairs `first`, `first` + 1, …, `[Q, count]` int64, a row of -1 where there are too few; which
    of their alternatives, `[Q, count]` uint64, a bit each).

    A query whose own answers fill its neighbours is searched again, with as many as it takes.
    """
    chosen = np.full((len(queries), guards.count), -1, np.int64)
    alternatives = np.zeros(chosen.shape, np.uint64)
    left, depth = list(range(len(queries))), guards.ranks[1] + _SPARE
    while left:
        again, at_a_time = [], max(1, _FOUND_AT_A_TIME // depth)
        for start in range(0, len(left), at_a_time):
            rows = left[start : start + at_a_time]
            scores, neighbours = search(index, queries[rows], depth)
            for row, near, similar in zip(rows, neighbours, scores, strict=True):
                there = near >= 0
                nearest = near[there].tolist(), similar[there].tolist()
                found, spare, more = choose(first + row, *nearest, float(positives[row]), known, guards)
                if len(found) < guards.count and more and depth < index.ntotal:
                    again.append(row)
                elif len(found) + len(spare) >= guards.count:
                    found += spare[: guards.count - len(found)]
                    chosen[row] = [pair for pair, _ in found]
                    alternatives[row] = [sum(1 << place for place in places if place < 64) for _, places in found]
        left, depth = again, 4 * depth
    return chosen, alternatives


class _Side:
    """All texts of one side of the pairs, of which equal ones have one number: that of the first."""

    def __init__(self, files: Sequence[Path], side: str, samples: passes.Numbered) -> None:
        parts = [passes.load(file, f"{side}_keys", f"{side}_counts") for file in files]
        self.keys = np.concatenate([part[f"{side}_keys"] for part in parts])
        self.counts = np.concatenate([part[f"{side}_counts"] for part in parts])
        self.pair = np.repeat(np.arange(len(self.counts)), self.counts)  # of each text
        _, first, group = np.unique(self.keys, return_index=True, return_inverse=True)
        self.number = first[group]
        self._order = np.argsort(self.number, kind="stable")
        self._sorted = self.number[self._order]
        self._side, self._samples = side, samples
        self._begins = np.cumsum(self.counts) - self.counts

    def by_pair(self) -> list[list[int]]:
        """The texts of each pair."""
        return [part.tolist() for part in np.split(self.number, self._begins[1:])]

    def text(self, number: int) -> str:
        pair = int(self.pair[number])
        text: str = self._samples.sample(pair).content[self._side][number - int(self._begins[pair])]["text"]
        return text

    def neighbours(self, signed: Signed, similarity: float) -> Callable[[int], set[int]]:
        """From a pair to the pairs one of whose texts is nearly one of its own."""
        near: defaultdict[int, set[int]] = defaultdict(set)
        different = self.number == np.arange(len(self.number))
        for one, other in alike_pairs(signed, similarity=similarity, among=different, text_of=self.text):
            near[one].add(other)
            near[other].add(one)
        texts = self.by_pair()
        return lambda pair: self.pairs_with({n for own in texts[pair] for n in (own, *near.get(own, ()))})

    def pairs_with(self, numbers: set[int]) -> set[int]:
        """The pairs that have one of these texts."""
        places = (np.searchsorted(self._sorted, [number, number + 1]) for number in numbers)
        return {pair for begin, end in places for pair in self.pair[self._order[begin:end]].tolist()}

    def numbers_in(self, other: _Side) -> list[list[int]]:
        """The texts of each pair that the other side has too, by their numbers there."""
        keys, first = np.unique(other.keys, return_index=True)
        places = np.minimum(np.searchsorted(keys, self.keys), len(keys) - 1)
        found = np.where(keys[places] == self.keys, first[places], -1)
        return [part[part >= 0].tolist() for part in np.split(found, self._begins[1:])]


def _right(queries: _Side, answers: _Side, pairs_of: Callable[[int], set[int]]) -> Callable[[int], set[int]]:
    """From a pair to the known answers of its query. Pairs may be of equals, as those of duplicate questions are: the
    query itself, and what it answers, are among them where they answer some query.
    """
    texts, asked = answers.by_pair(), queries.numbers_in(answers)

    def right(pair: int) -> set[int]:
        found = {text for one in pairs_of(pair) for text in texts[one]}
        own = set(asked[pair])
        return found | own | {text for one in answers.pairs_with(own) for text in asked[one]}

    return right


def _alike(
    queries: _Side, asked: Signed, answers: _Side, answered: Signed, similarity: float
) -> Callable[[int, int, Sequence[int]], bool]:
    """Whether an answer is nearly one of some others, or nearly a text of a pair's query."""
    among_answers = Comparison(answered, answered, similarity, answers.text, answers.text)
    among_queries = Comparison(answered, asked, similarity, answers.text, queries.text)
    texts = queries.by_pair()

    def alike(pair: int, text: int, others: Sequence[int]) -> bool:
        return among_answers.first(text, np.array(others)) >= 0 or among_queries.first(text, np.array(texts[pair])) >= 0

    return alike


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


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
