"""Searching files of vectors: blocks from the disk, so that memory does not limit how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stage_trainer.bulk.stored import Block, Stored
from stage_trainer.errors import UserError
from stage_trainer.metrics.quantization import BITS, restored
from stage_trainer.metrics.ranking import Best
from stage_trainer.metrics.rescoring import MULTIPLIER, signs


class Hit(NamedTuple):
    """Something found: its id, and its score: about the cosine, of bits that with the vector's signs."""

    id: str
    score: float


def search(files: Sequence[Stored], queries: np.ndarray, most: int, multiplier: int = MULTIPLIER) -> list[list[Hit]]:
    """The nearest of the vectors in some files, nearest first, of each query; equal ones in the order of the files.

    Args:
        files: of one precision, model and ranges (`open_together`).
        queries: float32 `[Q, dims]`, at length one.
        multiplier: of bits, so many times `most` are taken by their signs, and ranked by the query's own numbers.

    Raises:
        UserError: a file cannot be read, or its vectors were not normalized.
    """
    statement = files[0].statement
    if not statement.normalize:
        raise UserError(
            f"the vectors of {files[0].path} are not of length one (--no-normalize), so a search would rank by length; "
            "encode them without that option"
        )
    bits, total = statement.precision in BITS, sum(file.count for file in files)
    ranges = None if statement.ranges is None else np.array(statement.ranges, np.float32)
    best = Best(torch.from_numpy(signs(queries) if bits else queries), most * multiplier if bits else most)
    for first, block in _blocks(files):
        # Of equal scores the greatest rank goes first, which should be the first row.
        ranks = total - 1 - torch.arange(first, first + len(block.ids))
        best.add(torch.from_numpy(restored(block.codes, statement.precision, ranges)), ranks)
    places = total - 1 - best.ranks()
    ids, rows = _read(files, np.unique(places))
    found = []
    for query, own in zip(queries, places, strict=True):
        vectors = restored(np.stack([rows[int(place)] for place in own]), statement.precision, ranges)
        scores = vectors @ query
        order = np.lexsort((own, -scores))[:most]
        found.append([Hit(ids[int(own[n])], float(scores[n])) for n in order])
    return found


def _blocks(files: Sequence[Stored]) -> Iterator[tuple[int, Block]]:
    """Each block, after the place of its first row among those of all files."""
    first = 0
    for file in files:
        for block in file.blocks():
            yield first, block
            first += len(block.ids)


def _read(files: Sequence[Stored], places: np.ndarray) -> tuple[dict[int, str], dict[int, np.ndarray]]:
    """Ids and stored rows at some places."""
    ids, rows = {}, {}
    for first, block in _blocks(files):
        for place in places[(places >= first) & (places < first + len(block.ids))].tolist():
            ids[place], rows[place] = block.ids[place - first], block.codes[place - first]
    return ids, rows
