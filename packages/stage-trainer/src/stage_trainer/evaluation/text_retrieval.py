"""Evaluation on text pairs: nDCG@10 of retrieving each query's target, Spearman's correlation with people's scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stage_trainer.data.remote_data import RemotePlace, open_place
from stage_trainer.data.samples import shard_errors_explained, texts_of
from stage_trainer.metrics.rescoring import Index, exact
from stage_trainer.metrics.retrieval import ndcg_at_k, unit
from stage_trainer.metrics.sts import spearman

K = 10


@dataclass(frozen=True)
class PairPool:
    """Text pairs: `queries[language]` is [(target number, query), …], one for each language of each pair.

    A pair's target is its first English text that is not the query itself, or else its first text that is not. Equal
    targets count once. `scores` are people's scores of the pairs, [(query, target number, score), …].
    """

    name: str
    targets: list[str]
    queries: dict[str, list[tuple[int, str]]]
    scores: list[tuple[str, int, float]]

    @classmethod
    @shard_errors_explained()
    def open(cls, directory: str | Path | RemotePlace) -> PairPool:
        """Reads a data set of text pairs, or of triplets, whose negatives are ignored.

        Raises:
            UserError: the data set is missing or damaged.
        """
        data = open_place(directory)
        numbers: dict[str, int] = {}
        queries: dict[str, dict[tuple[int, str], None]] = {}
        scores = []
        for index in range(len(data)):
            content = texts_of(data, index, data.read(index))
            seen = set()
            for query in content["query"]:
                language = query["language"]
                others = [t for t in content["target"] if t["text"] != query["text"]]
                if language in seen or not others:
                    continue
                seen.add(language)
                text = next((t for t in others if t["language"] == "en"), others[0])["text"]
                number = numbers.setdefault(text, len(numbers))
                queries.setdefault(language, {})[number, query["text"]] = None
                if "score" in content:
                    scores.append((query["text"], number, float(content["score"])))
        return cls(data.source, list(numbers), {k: list(v) for k, v in sorted(queries.items())}, scores)

    def texts(self) -> list[str]:
        return sorted({*self.targets, *(text for entries in self.queries.values() for _, text in entries)})


def measure(pool: PairPool, vectors: Callable[[Sequence[str]], np.ndarray], index: Index = exact) -> dict[str, float]:
    """{"ndcg_at_10/LANGUAGE", "ndcg_at_10/mean", "spearman"}, by the queries' language.

    Args:
        vectors: unit vectors `[N, D]` of N texts.
        index: how targets are stored; the correlation is of exact vectors.
    """
    targets, place = vectors(pool.targets), {text: i for i, text in enumerate(pool.targets)}
    found: dict[str, float] = {}
    scores_of = index(targets)
    for language, entries in pool.queries.items():
        relevant: dict[str, set[int]] = {}
        for number, text in entries:
            relevant.setdefault(text, set()).add(number)
        gains = []
        for text, scores in zip(relevant, scores_of(vectors(list(relevant))), strict=True):
            if text in place and place[text] not in relevant[text]:
                scores[place[text]] = -np.inf  # a query does not retrieve itself
            gains.append(ndcg_at_k(scores, relevant[text], k=K))
        found[f"ndcg_at_10/{language}"] = float(np.mean(gains))
    if found:
        found["ndcg_at_10/mean"] = float(np.mean(list(found.values())))
    if pool.scores:
        left = vectors([query for query, _, _ in pool.scores])
        right = targets[[number for _, number, _ in pool.scores]]
        found["spearman"] = spearman((left * right).sum(axis=1), np.array([score for _, _, score in pool.scores]))
    return found


def lookup(texts: Sequence[str], vectors: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    """What `measure` calls: the unit vectors of some of `texts`, whose embeddings `[N, D]` are `vectors`."""
    row, units = {text: i for i, text in enumerate(texts)}, unit(vectors)
    return lambda wanted: units[[row[text] for text in wanted]]
