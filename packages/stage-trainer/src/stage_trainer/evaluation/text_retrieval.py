"""Held-out text pairs: nDCG@10 of finding each query's target, and Spearman's correlation where pairs have scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_prep.shards import Dataset, ShardError

from stage_trainer.data.remote_data import RemotePlace, open_place
from stage_trainer.data.samples import texts_of
from stage_trainer.errors import UserError

K = 10


@dataclass(frozen=True)
class PairPool:
    """Pairs of texts: `queries[language]` is [(target number, query), …], one of each language of each pair.

    A pair's target is its first English text, or its first at all, that is not the query itself. Equal targets are
    one. `scores` are those that people gave the pairs, [(query, target number, score), …].
    """

    name: str
    targets: list[str]
    queries: dict[str, list[tuple[int, str]]]
    scores: list[tuple[str, int, float]]

    @classmethod
    def open(cls, directory: str | Path | RemotePlace) -> PairPool:
        """Reads a data set of text pairs or triplets, whose negatives are left out.

        Raises:
            UserError: a data set that is missing or damaged.
        """
        try:
            return cls._read(open_place(directory))
        except (ShardError, FileNotFoundError) as error:
            raise UserError(str(error)) from error

    @classmethod
    def _read(cls, data: Dataset) -> PairPool:
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


def measure(pool: PairPool, vectors: Callable[[Sequence[str]], np.ndarray]) -> dict[str, float]:
    """{"ndcg_at_10/LANGUAGE", "ndcg_at_10/mean", "spearman"}, the languages being those of the queries.

    Args:
        vectors: unit vectors `[N, D]` of N texts.
    """
    targets, place = vectors(pool.targets), {text: i for i, text in enumerate(pool.targets)}
    found: dict[str, float] = {}
    for language, entries in pool.queries.items():
        relevant: dict[str, set[int]] = {}
        for number, text in entries:
            relevant.setdefault(text, set()).add(number)
        gains = []
        for text, scores in zip(relevant, vectors(list(relevant)) @ targets.T, strict=True):
            if text in place and place[text] not in relevant[text]:
                scores[place[text]] = -np.inf  # a query does not look for itself
            gains.append(ndcg_at_k(scores, relevant[text]))
        found[f"ndcg_at_10/{language}"] = float(np.mean(gains))
    if found:
        found["ndcg_at_10/mean"] = float(np.mean(list(found.values())))
    if pool.scores:
        left = vectors([query for query, _, _ in pool.scores])
        right = targets[[number for _, number, _ in pool.scores]]
        found["spearman"] = spearman((left * right).sum(axis=1), np.array([score for _, _, score in pool.scores]))
    return found


def ndcg_at_k(scores: np.ndarray, relevant: set[int], k: int = K) -> float:
    """Of one query: scores `[C]` of the candidates, and which of them are relevant, all alike."""
    top = np.argsort(-scores, kind="stable")[:k]
    gain = sum(1 / np.log2(place + 2) for place, candidate in enumerate(top) if int(candidate) in relevant)
    return float(gain / sum(1 / np.log2(place + 2) for place in range(min(k, len(relevant)))))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
