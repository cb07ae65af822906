"""Tables of figures, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict

from stage_trainer.evaluation.retrieval import DIRECTIONS, Scores
from stage_trainer.metrics.quantization import stored_bytes


class Stored(TypedDict, total=False):
    """The same measures as of `Figures`, of candidates that are stored in fewer bits."""

    recall_at_5: Scores
    ndcg_at_5: Scores
    ndcg_at_10: dict[str, dict[str, float]]


class Figures(TypedDict, total=False):
    """What a model reaches on one pool: the content of evaluation.json and report.json.

    Attributes:
        kind, folder: of the data set.
        checkpoint: the evaluated one, if the model is a checkpoint's.
        images: their number.
        texts: their number, by language.
        recall_at_5, ndcg_at_5: direction → dim → language; nDCG only of pages that answer queries.
        chance: the recall of a random guess, direction → language.
        targets: the number of texts that queries look for, in a pool of text pairs.
        ndcg_at_10: dim → language.
        spearman: by dim, if pairs have scores.
        stored: by precision, if that was asked for.
    """

    kind: str
    folder: str
    checkpoint: str
    images: int
    texts: dict[str, int]
    recall_at_5: Scores
    ndcg_at_5: Scores
    chance: dict[str, dict[str, float]]
    targets: int
    ndcg_at_10: dict[str, dict[str, float]]
    spearman: dict[str, float]
    stored: dict[str, Stored]


Pools = dict[str, Figures]
"""Figures by the pool's name."""


def table(pools: Pools) -> str:
    """The table of one model: rows are pools and directions, columns Matryoshka dims; means over languages."""
    return stages_table({"": pools})


def stages_table(stages: dict[str, Pools]) -> str:
    """The table of a run's stages, {stage: what `evaluate` returned}; all figures in percent, means over languages.

    Of images recall@5 (of pages also nDCG@5) by pool, direction, stage and dim, with the level of a random guess; of
    texts nDCG@10 by pool, stage and dim, with Spearman's correlation at the full width.
    """
    pools: Pools = {}
    for of_stage in stages.values():
        pools |= of_stage
    measures: list[tuple[Literal["recall_at_5", "ndcg_at_5"], str]] = [("recall_at_5", d) for d in DIRECTIONS]
    measures.append(("ndcg_at_5", DIRECTIONS[0]))
    by_dim = (each.get("ndcg_at_10") or next(iter(each["recall_at_5"].values())) for each in pools.values())
    dims = sorted({int(dim) for found in by_dim for dim in found}, reverse=True)
    of_images: list[list[str]] = []
    of_texts: list[list[str]] = []
    for pool, its in pools.items():
        for measure, direction in measures:
            for label, figures in _having(stages, pool):
                if values := figures.get(measure, {}).get(direction):
                    ranked = measure == "ndcg_at_5"
                    chance = "" if ranked else f"{100 * figures['chance'][direction]['mean']:.1f}"
                    what = f"{direction}, nDCG@5" if ranked else direction
                    of_images.append(
                        [f"{pool} ({its['images']:,} images)", what, *label, *_cells(values, dims), chance]
                    )
        for label, figures in _having(stages, pool):
            if values := figures.get("ndcg_at_10"):
                scores = figures.get("spearman", {})
                score = f"{100 * next(iter(scores.values())):.1f}" if scores else ""
                of_texts.append([f"{pool} ({its['targets']:,} targets)", *label, *_cells(values, dims), score])
    columns = [f"{dim} dims" for dim in dims]
    after = [] if list(stages) == [""] else ["after"]
    parts = [
        (of_images, ["pool", "recall@5, %", *after, *columns, "blind guess"], 2 + len(after)),
        (of_texts, ["text pairs, nDCG@10, %", *after, *columns, "Spearman"], 1 + len(after)),
    ]
    return "\n\n".join(aligned([header, *rows], words) for rows, header, words in parts if rows)


def measures(pool: Figures | Stored) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """(name, dim → language → value) of everything that ranks, measured on a pool."""
    for direction, by_dim in pool.get("recall_at_5", {}).items():
        yield f"{direction}, recall@5", by_dim
    for direction, by_dim in pool.get("ndcg_at_5", {}).items():
        yield f"{direction}, nDCG@5", by_dim
    if of_texts := pool.get("ndcg_at_10"):
        yield "text pairs, nDCG@10", of_texts


def precision_rows(pools: Pools) -> tuple[list[str], list[list[str]]]:
    """(head, rows): what pools that were measured in several precisions reach, by dim; no rows if none were. Figures in
    percent, means over languages."""
    those = {name: pool for name, pool in pools.items() if pool.get("stored")}
    dims = sorted({int(d) for pool in those.values() for _, by_dim in measures(pool) for d in by_dim}, reverse=True)
    rows = []
    for name, pool in those.items():
        for measure, full in measures(pool):
            rows.append([name, measure, "float32", f"{stored_bytes('float32', dims[0]):,}", *_cells(full, dims)])
            for precision, stored in pool["stored"].items():
                if by_dim := dict(measures(stored)).get(measure):
                    size = f"{stored_bytes(precision, dims[0]):,}"
                    rows.append([name, measure, precision, size, *_cells(by_dim, dims)])
    head = ["held-out data", "figure, %", "stored in", "bytes", *(f"{dim} dims" for dim in dims)]
    return head, rows


def precision_table(pools: Pools) -> str:
    """`precision_rows` as text; empty if there are none."""
    head, rows = precision_rows(pools)
    return aligned([head, *rows], 3) if rows else ""


def _having(stages: dict[str, Pools], pool: str) -> list[tuple[list[str], Figures]]:
    """([the stage's name, if it has one], figures) of the stages that have a pool."""
    return [([stage] if stage else [], pools[pool]) for stage, pools in stages.items() if pool in pools]


def _cells(by_dim: dict[str, dict[str, float]], dims: list[int]) -> list[str]:
    return [f"{100 * by_dim[str(d)]['mean']:.1f}" if str(d) in by_dim else "" for d in dims]


def languages_table(pools: Pools, direction: str) -> str:
    """By language at the full width: recall@5 of images in one direction, nDCG@10 of texts; in percent."""
    rows = [["pool", "language", "figure", "%"]]
    for pool, figures in pools.items():
        texts = "ndcg_at_10" in figures
        by_dim = figures["ndcg_at_10"] if texts else figures["recall_at_5"].get(direction, {})
        for language, value in next(iter(by_dim.values()), {}).items():
            rows.append([pool, language, "nDCG@10" if texts else f"{direction}, recall@5", f"{100 * value:.1f}"])
    return aligned(rows, 3)


def aligned(rows: Sequence[Sequence[str]], words: int) -> str:
    """Pads columns to equal width: the first `words` aligned to the left, the others, numbers, to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def joined(head: str, parts: Sequence[str], width: int = 120) -> str:
    """`head part, part, …`, wrapped between parts to lines of at most `width` columns."""
    lines = [head]
    for number, part in enumerate(parts):
        part += "," if number < len(parts) - 1 else ""
        if len(lines[-1]) + 1 + len(part) > width and number:
            lines.append(" ")
        lines[-1] += f" {part}"
    return "\n".join(lines)
