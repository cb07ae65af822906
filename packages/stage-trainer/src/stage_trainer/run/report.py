"""Tables and report.json: every figure of a run, beside what a blind guess would reach."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import DIRECTIONS, Pool, embed, ndcg, pools_of, score
from stage_trainer.files import write_whole
from stage_trainer.model import DualEncoder
from stage_trainer.run.environment import versions


def evaluate(model_directory: str | Path, data: str | Path) -> dict[str, Any]:
    """Figures by pool: number of images, of texts by language; recall_at_5 by direction, dim and language; chance by
    direction and language; of pages ndcg_at_5, too."""
    model = DualEncoder.from_pretrained(model_directory)
    width = model.text.config.width
    dims = sorted({*(model.matryoshka_dims or ()), width}, reverse=True)
    found: dict[str, Any] = {}
    for directory in pools_of(data):
        pool = Pool.open(directory)
        embedded = embed(model, pool)
        recalls, chances = score(pool, embedded, dims)
        found[pool.name] = {
            "images": len(pool.images),
            "texts": {language: len(entries) for language, entries in pool.texts.items()},
            "recall_at_5": {d: v for d, v in recalls.items() if v},
            "chance": {d: v["chance"] for d, v in chances.items() if v},
            **({"ndcg_at_5": ndcg(pool, embedded, dims)} if pool.documents else {}),
        }
    return found


def table(pools: dict[str, Any]) -> str:
    """One model's figures: rows are pools and directions, columns Matryoshka dims; mean over languages."""
    return stages_table({"": pools})


def stages_table(stages: dict[str, dict[str, Any]]) -> str:
    """recall@5 (of pages nDCG@5, too), percent, by pool, direction, stage and dim, with the chance level beside it."""
    rows: list[list[str]] = []
    last = next(reversed(stages.values()))
    dims = list(next(iter(next(iter(last.values()))["recall_at_5"].values())))
    for pool in last:
        for measure, direction in [*(("recall_at_5", d) for d in DIRECTIONS), ("ndcg_at_5", DIRECTIONS[0])]:
            for stage, pools in stages.items():
                values = pools.get(pool, {}).get(measure, {}).get(direction)
                if values:
                    ranked = measure == "ndcg_at_5"
                    chance = "" if ranked else f"{100 * pools[pool]['chance'][direction]['mean']:.1f}"
                    cells = [f"{100 * values[d]['mean']:.1f}" if d in values else "" for d in dims]
                    what = f"{direction}, nDCG@5" if ranked else direction
                    rows.append([f"{pool} ({pools[pool]['images']} images)", what, stage, *cells, chance])
    header = ["pool", "recall@5, %", "after", *[f"{d} dims" for d in dims], "chance"]
    if list(stages) == [""]:
        rows, header = [[*r[:2], *r[3:]] for r in rows], [*header[:2], *header[3:]]
    return _align([header, *rows])


def languages_table(pools: dict[str, Any], direction: str) -> str:
    """One direction by language, at the full width."""
    rows = [["pool", "language", "recall@5, %"]]
    for pool, figures in pools.items():
        by_dim = figures["recall_at_5"].get(direction, {})
        for language, value in next(iter(by_dim.values()), {}).items():
            rows.append([pool, language, f"{100 * value:.1f}"])
    return _align(rows)


def write_report(run: str | Path, recipe_name: str, seed: int) -> tuple[Path, str]:
    """Gathers `evaluation.json` of each finished stage of a run into `report.json`; returns its path and the table.

    Raises:
        UserError: no stage of the run has been evaluated.
    """
    from stage_trainer.run.start import summary

    run = Path(run)
    stages: dict[str, dict[str, Any]] = {}
    parts: dict[str, Any] = {}
    numbers = sorted(int(p.name[5:]) for p in run.glob("stage*") if p.name[5:].isdigit())  # not what was moved aside
    for directory in [run / f"stage{number}" for number in numbers]:
        if (path := directory / "evaluation.json").exists():
            stages[directory.name] = json.loads(path.read_text())
            parts[directory.name] = summary(directory)
    if not stages:
        raise UserError(f"{run} has no stage*/evaluation.json; run `stage-trainer evaluate` on its stages first")
    if (timings := run / "timings.json").exists():
        parts["commands"] = json.loads(timings.read_text())
    report = {"recipe": recipe_name, "seed": seed, "versions": versions(), "parts": parts, "stages": stages}
    target = run / "report.json"
    write_whole(target, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return target, stages_table(stages)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text_columns = 3 if "after" in rows[0] else 2
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
