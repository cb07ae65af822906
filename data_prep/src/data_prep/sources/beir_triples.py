"""Hard negatives by ids: which passages answer a query and which do not, mined and scored by others for MS MARCO.

JSON lines or parquet of {query_id, positive_id, negative_id, score}, {qid, pos: […], neg: {system: […]}} (as
sentence-transformers publishes them) or [qid, [pid, score], …] with the positive first (ColBERT); TSV of ids, or of two
scores and three ids (Hofstätter's). They are brought into the forms that `judged` reads, with ids for texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject
from data_prep.sources.beir_files import cells_of
from data_prep.sources.ids import same_id
from data_prep.sources.judged import judged
from data_prep.sources.parquet import parquet_columns, parquet_pieces, read_parquet
from data_prep.sources.records import Dropped, Noted, Row
from data_prep.sources.tables import is_json_lines, line_pieces, read_lines

_RENAMED = {"qid": "query", "query_id": "query", "query-id": "query", "positive_id": "positive", "positive_ids": "pos"}
_RENAMED |= {"negative_id": "negative", "negative_ids": "neg", "passage_ids": "docs", "doc_ids": "docs"}
_PASSAGE = ("pid", "docid", "doc_id", "passage_id", "id")
_SCORE = ("ce-score", "ce_score", "score")
_ODD = "ids of no known form"


class Mark(NamedTuple):
    """A judgement of a document, and a teacher's score of it with the query; None if there is none."""

    grade: float
    score: float | None = None


Groups = dict[str, dict[str, Mark]]
"""Query → document → its mark."""


def triples(path: Path, margin: float, relevant: float, most: int, lost: list[Dropped | Noted]) -> Groups:
    """The judgements of a file of triples: `relevant` for positives, 0 for negatives, `most` of them for a query.

    Args:
        margin: negatives stay that a teacher scores more than this below the positive.
        lost: takes what cannot be read, and how many negatives the scores took away.

    Raises:
        UserError: the file cannot be read.
    """
    groups: Groups = {}
    for row in _rows(path):
        if isinstance(row, Dropped):
            lost.append(row)
            continue
        where, value = row
        found = judged(value, margin) if (value := _named(value)) else None
        if found is None or isinstance(found, str):
            lost.append(Dropped(found or _ODD, where))
            continue
        if found.left_out:
            lost.append(Noted("negatives left out: scored nearly as high as the positive", found.left_out))
        group = groups.setdefault(found.query, {})
        group.update((passage.text, Mark(relevant, passage.score)) for passage in found.positives)
        for passage in found.negatives[: max(0, most + len(found.positives) - len(group))]:
            group.setdefault(passage.text, Mark(0.0, passage.score))
    return groups


def _rows(path: Path) -> Iterator[Row | Dropped]:
    if is_json_lines(path):
        for piece in line_pieces(path):
            yield from read_lines(piece)
    elif path.suffix == ".parquet":
        for piece in parquet_pieces([path], 1_000_000, columns=()):
            yield from read_parquet(piece, parquet_columns(path))
    elif path.name.lower().endswith((".tsv", ".tsv.gz", ".txt")):
        for row in cells_of(path):
            yield row if isinstance(row, Dropped) else (row[0], _of_cells(row[1]))
    else:
        raise UserError(f"--triples {path}: expected .jsonl, .parquet or .tsv")


def _of_cells(cells: list[str]) -> JsonObject | None:
    """query, positive, negative; or two scores before them."""
    if len(cells) not in (3, 5):
        return None
    names = ("query_id", "positive_id", "negative_id")
    row: JsonObject = dict(zip(names, cells[-3:], strict=True))
    return {**row, "score": cells[:2]} if len(cells) == 5 else row


def _named(value: Any) -> JsonObject | None:
    """A row under the names that `judged` knows, with ids as texts; None if it has another form."""
    if isinstance(value, list) and len(value) > 1:
        value = {"query": value[0], "pos": value[1:2], "neg": value[2:]}
    if not isinstance(value, dict):
        return None
    row: JsonObject = {_RENAMED.get(str(name), str(name)): each for name, each in value.items()}
    for name in list(row):
        if name == "query":
            row[name] = same_id(row[name])
        elif name in ("pos", "neg", "docs") or name.startswith(("positive", "negative")):
            row[name] = _passages(row[name])
    return row


def _passages(value: Any) -> Any:
    """Ids as passages: a number, {pid, ce-score}, [pid, score], lists of them, or lists by system, taken in turn."""
    if isinstance(value, dict) and any(isinstance(each, list) for each in value.values()):
        lists = [each for each in value.values() if isinstance(each, list)]
        value = [each for turn in zip_longest(*lists) for each in turn if each is not None]
    if isinstance(value, list):
        return [_passage(each) for each in value]
    return _passage(value)


def _passage(value: Any) -> Any:
    score = None
    if isinstance(value, list) and len(value) == 2:
        value, score = value
    elif isinstance(value, dict):
        score = next((value[name] for name in _SCORE if name in value), None)
        value = next((value[name] for name in _PASSAGE if name in value), None)
    return {"text": same_id(value), "score": score}
