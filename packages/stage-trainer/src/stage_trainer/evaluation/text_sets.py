"""Texts as MTEB measures them: fifteen retrieval sets (nDCG@10), ten of similarity (Spearman's correlation).

A retrieval set is a folder in BEIR's form: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) and
qrels/SPLIT.tsv (query, document, grade). A set of pairs is test.jsonl (`sentence1`, `sentence2`, `score`).
`data-prep evalset beir` and `sts` write them from what MTEB's hub repositories hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stage_trainer.errors import UserError
from stage_trainer.evaluation.measured import Measured, compared
from stage_trainer.evaluation.models import Embedder
from stage_trainer.evaluation.sets import SAME_IDS_LEFT_OUT, SET, EvalSet
from stage_trainer.files import read_json, sha256
from stage_trainer.metrics.ranking import Best, ndcg
from stage_trainer.metrics.retrieval import unit
from stage_trainer.metrics.sts import spearman

NDCG_10, SPEARMAN = "nDCG@10", "Spearman"
DOCUMENTS = 20_000  # embedded at a time; the largest corpus has 8.8 million
SPLIT = {"MSMARCO": "dev"}  # all others: test
SUBSET = {"STS17": "en-en", "STS22": "en"}  # of `lang`, where a file holds several


@dataclass(frozen=True)
class Judged:
    """Queries that have judgements, by id: their texts, and document → grade."""

    texts: dict[str, str]
    grades: dict[str, dict[str, float]]


def measure_retrieval(model: Embedder, known: EvalSet, folder: Path, say: Callable[[str], None]) -> Measured:
    """nDCG@10 at every dim, from one pass over the corpus, of which only the ten best documents of a query stay.

    Raises:
        UserError: a part is missing or of another form, its ids do not join, or the embeddings cannot be ranked by.
    """
    _check_whole(folder)
    ids = [name for name, _ in _documents(folder)]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    place = {name: int(rank[number]) for number, name in enumerate(ids)}
    if len(place) < len(ids):
        raise UserError(f"{folder / 'corpus.jsonl'} has {len(ids) - len(place):,} ids twice; expected each id once")
    judged, notes = _judged(folder, known, place)
    tops = _Tops(model, list(judged.texts.items()), place, known.name in SAME_IDS_LEFT_OUT)
    documents = (text for _, text in _documents(folder))
    done = 0
    while part := list(islice(documents, DOCUMENTS)):
        tops.add(model.embed_texts(part), rank[done : done + len(part)])
        done += len(part)
        if len(ids) > DOCUMENTS:
            say(f"{known.name}: {done:,} of {len(ids):,} documents")
    gains = [{place[d]: g for d, g in judged.grades[query].items() if d in place} for query in judged.texts]
    # A judged document that is not in the corpus cannot be found, but the ideal ranking has it, as in trec_eval.
    for own, query in zip(gains, judged.texts, strict=True):
        own.update({-2 - n: g for n, (d, g) in enumerate(judged.grades[query].items()) if d not in place})
    values = {str(dim): float(ndcg(found, gains, 10).mean()) for dim, found in tops.ranks().items()}
    counts = {"queries": len(judged.texts), "documents": len(ids)}
    differ = compared(known, counts)
    # A published set may have such judgements itself; where its counts are known, they decide.
    whole = not differ if known.counts else not notes
    return Measured({NDCG_10: {known.name: values}}, counts, (*differ, *notes), whole)


class _Tops:
    """The best ten documents of each query at every dim."""

    def __init__(self, model: Embedder, queries: list[tuple[str, str]], place: dict[str, int], without_own: bool):
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        rows = model.embed_texts([text for _, text in queries], query=True)
        own = [place.get(name, -1) for name, _ in queries] if without_own else None
        shut_out = None if own is None else torch.tensor(own, device=self.device)
        self.best = {dim: Best(self._units(rows, dim), 10, shut_out) for dim in model.dims}

    def add(self, rows: np.ndarray, ranks: np.ndarray) -> None:
        import torch

        places = torch.from_numpy(ranks).to(self.device)
        for dim, best in self.best.items():
            best.add(self._units(rows, dim), places)

    def ranks(self) -> dict[int, np.ndarray]:
        return {dim: best.ranks() for dim, best in self.best.items()}

    def _units(self, rows: np.ndarray, dim: int) -> Any:
        import torch

        return torch.from_numpy(unit(rows[:, :dim])).to(self.device)


def _judged(folder: Path, known: EvalSet, place: dict[str, int]) -> tuple[Judged, list[str]]:
    split = SPLIT.get(known.name, "test")
    qrels = folder / "qrels" / f"{split}.tsv"
    grades = _qrels(qrels)
    texts = {}
    for name, fields in _rows(folder / "queries.jsonl"):
        if name in grades:
            texts[name] = _text(fields, "text", folder / "queries.jsonl", name)
    found = sum(document in place for own in grades.values() for document in own)
    if not texts or not found:
        what = "queries" if not texts else "corpus"
        raise UserError(f"{qrels}: none of its ids is among those of {folder / what}.jsonl; are they of one set?")
    notes = []
    if lost := len(grades) - len(texts):
        notes.append(f"{known.name}: {lost:,} queries with judgements are not among the queries")
    if lost := sum(map(len, grades.values())) - found:
        notes.append(f"{known.name}: {lost:,} judgements are of documents that the corpus does not have")
    if idle := [name for name in texts if not any(grade > 0 for grade in grades[name].values())]:
        notes.append(f"{known.name}: {len(idle):,} queries have no relevant document ({idle[0]!r}); each counts as 0")
    return Judged(texts, {name: grades[name] for name in texts}), notes


def _documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, title and text joined by a space) of each document."""
    path = folder / "corpus.jsonl"
    for name, fields in _rows(path):
        title = fields.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f"{path}: the title of {name!r} is {title!r:.80}; expected a text")
        yield name, f"{title} {_text(fields, 'text', path, name)}".strip()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, fields) of each line of JSON."""
    for where, fields in _lines(path):
        name = fields.get("_id", fields.get("id"))
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise UserError(f"{where}: its _id is {name!r:.80}; expected a text or a number")
        yield str(name), fields


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise UserError(f"{path}, line {number}: expected an object, found {line[:80]!r}")
                    yield f"{path}, line {number}", fields
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make the set with `data-prep evalset beir` or `sts`") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no JSON lines in UTF-8 ({error})") from error


def _qrels(path: Path) -> dict[str, dict[str, float]]:
    """query → document → grade; the last judgement of a pair counts, as in BEIR."""
    grades: dict[str, dict[str, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        there = ", ".join(sorted(each.name for each in path.parent.glob("*.tsv"))) or "none"
        raise UserError(f"{path} is missing; there are judgements in {there}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        cells = line.rstrip("\r").split("\t")
        if not line.strip() or (number == 1 and cells[0] == "query-id"):
            continue
        query, *_, document, said = cells if len(cells) in (3, 4) else ("", "", "")  # TREC's second says nothing
        try:
            grade = float(said)
        except ValueError:
            grade = np.nan
        if not np.isfinite(grade):
            raise UserError(f"{path}, line {number}: expected query, document, grade, found {line[:80]!r}")
        grades.setdefault(query, {})[document] = grade
    return grades


def measure_pairs(model: Embedder, known: EvalSet, folder: Path) -> Measured:
    """Spearman's correlation of cosines with people's scores, at every dim, over all pairs.

    Raises:
        UserError: the file is missing or of another form, or the embeddings or scores say nothing.
    """
    _check_whole(folder)
    path = folder / "test.jsonl"
    left, right, scores = [], [], []
    for where, fields in _lines(path):
        if fields.get("lang", SUBSET.get(known.name)) != SUBSET.get(known.name) and known.name in SUBSET:
            continue
        score = fields.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
            raise UserError(f"{where}: the score is {score!r:.80}; expected a number")
        left.append(_text(fields, "sentence1", path, where))
        right.append(_text(fields, "sentence2", path, where))
        scores.append(float(score))
    if len(set(scores)) < 2:
        raise UserError(f"{path} has {len(scores)} pairs with {len(set(scores))} different scores; expected several")
    texts = sorted({*left, *right})
    row = {text: number for number, text in enumerate(texts)}
    vectors = model.embed_texts(texts)
    values = {}
    for dim in model.dims:
        units = unit(vectors[:, :dim].astype(np.float64))
        cosines = (units[[row[text] for text in left]] * units[[row[text] for text in right]]).sum(axis=1)
        # Vectors are float32: what is less apart is equal, above all the pairs of a sentence with itself.
        values[str(dim)] = spearman(cosines.round(9), np.array(scores))
        if not np.isfinite(values[str(dim)]):
            raise UserError(
                f"{model.name} finds all pairs of {path} equally alike; nothing can be correlated with that"
            )
    counts = {"pairs": len(scores)}
    notes = compared(known, counts)
    return Measured({SPEARMAN: {known.name: values}}, counts, tuple(notes), not notes)


def _check_whole(folder: Path) -> None:
    """Compares every file with its hash in set.json, if there is one: of another's folder nothing is known."""
    if not (folder / SET).is_file():
        return
    try:
        for name, said in read_json(folder / SET)["files"].items():
            if sha256(folder / name) != said["sha256"]:
                raise UserError(f"{folder / name} is not what set.json says (its hash differs); make the set again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is damaged ({error}); make the set again with `data-prep evalset`") from error


def _text(fields: dict[str, Any], key: str, path: Path, name: str) -> str:
    text = fields.get(key)
    if not isinstance(text, str):
        raise UserError(f"{path}: {key} of {name!r} is {text!r:.80}; expected a text")
    return text
