"""What a model reaches on held-out data, as tables and as report.json, beside what a blind guess would reach."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.evaluation import text_retrieval
from stage_trainer.evaluation.held_out import HeldOut, find
from stage_trainer.evaluation.retrieval import DIRECTIONS, Pool, cut_texts, embed, embed_texts, ndcg, score, unit
from stage_trainer.files import write_whole
from stage_trainer.recipe import Recipe
from stage_trainer.run.checkpoint import all_saved
from stage_trainer.run.environment import versions
from stage_trainer.run.monitor import joined

EVALUATION = "evaluation.json"


def evaluate(model_directory: str | Path, data: str | Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures by pool, with its kind and folder. Of images: their number, that of texts by language, recall_at_5 by
    direction, dim and language, chance by direction and language; of pages ndcg_at_5, too. Of texts: their number,
    ndcg_at_10 by dim and language, and spearman by dim where pairs have scores.

    Args:
        say: is told what is measured, and what is not.

    Raises:
        UserError: nothing to measure, or a model or data that cannot be read.
    """
    found = find(data)
    model = DualEncoder.from_pretrained(model_directory)
    dims = sorted({*(model.matryoshka_dims or ()), model.text.config.width}, reverse=True)
    say(joined(f"measuring on {found.where}:", [f"{s.kind}/{s.directory.name}" for s in found.sets]))
    figures: dict[str, Any] = {}
    for held_out in found.sets:
        measured = _of_images(model, held_out, dims, say) if held_out.images else _of_texts(model, held_out, dims, say)
        if measured:
            figures[held_out.name] = {"kind": held_out.kind, "folder": str(held_out.directory), **measured}
    if not figures:
        raise UserError(f"{data} has nothing to measure; give a folder with images and captions, or with text pairs")
    return figures


def _of_images(model: DualEncoder, held_out: HeldOut, dims: list[int], say: Callable[[str], None]) -> dict[str, Any]:
    pool = Pool.open(held_out.directory)
    say(f"{held_out.name}: {len(pool.images):,} images, {len(pool.all_texts()):,} texts …")
    _say_cut(model, pool.all_texts(), held_out.name, say)
    embedded = embed(model, pool)
    recalls, chances = score(pool, embedded, dims)
    return {
        "images": len(pool.images),
        "texts": {language: len(entries) for language, entries in pool.texts.items()},
        "recall_at_5": {d: v for d, v in recalls.items() if v},
        "chance": {d: v["chance"] for d, v in chances.items() if v},
        **({"ndcg_at_5": ndcg(pool, embedded, dims)} if pool.documents else {}),
    }


def _of_texts(model: DualEncoder, held_out: HeldOut, dims: list[int], say: Callable[[str], None]) -> dict[str, Any]:
    pool = text_retrieval.PairPool.open(held_out.directory)
    if not pool.queries:
        say(f"{held_out.name} is not measured: it has no pair of two texts that differ")
        return {}
    texts = pool.texts()
    say(f"{held_out.name}: {len(texts):,} texts …")
    _say_cut(model, texts, held_out.name, say)
    vectors, row = embed_texts(model, texts), {text: i for i, text in enumerate(texts)}
    figures: dict[str, Any] = {"targets": len(pool.targets), "ndcg_at_10": {}}
    for dim in dims:
        units = unit(vectors[:, :dim])
        measured = text_retrieval.measure(pool, lambda wanted, u=units: u[[row[text] for text in wanted]])  # type: ignore[misc]
        if "spearman" in measured:
            figures.setdefault("spearman", {})[str(dim)] = measured.pop("spearman")
        figures["ndcg_at_10"][str(dim)] = {name.removeprefix("ndcg_at_10/"): v for name, v in measured.items()}
    return figures


def _say_cut(model: DualEncoder, texts: Sequence[str], name: str, say: Callable[[str], None]) -> None:
    cut, longest = cut_texts(model, texts)
    if cut:
        say(f"{name}: {cut:,} of its {len(texts):,} texts are longer than {longest} tokens; their ends are cut off")


def table(pools: dict[str, Any]) -> str:
    """One model's figures: rows are pools and directions, columns Matryoshka dims; mean over languages."""
    return stages_table({"": pools})


def stages_table(stages: dict[str, dict[str, Any]]) -> str:
    """Of images recall@5 (of pages nDCG@5, too) by pool, direction, stage and dim, with the chance level beside it; of
    texts nDCG@10 by pool, stage and dim, with Spearman's correlation at the full width. All in percent."""
    pools: dict[str, Any] = {}
    for of_stage in stages.values():
        pools |= of_stage
    measures = [*(("recall_at_5", d) for d in DIRECTIONS), ("ndcg_at_5", DIRECTIONS[0])]
    dims = sorted({int(dim) for figures in pools.values() for dim in _by_dim(figures)}, reverse=True)
    of_images: list[list[str]] = []
    of_texts: list[list[str]] = []
    for pool, its in pools.items():
        for measure, direction in measures:
            for stage, figures in _having(stages, pool):
                if values := figures.get(measure, {}).get(direction):
                    ranked = measure == "ndcg_at_5"
                    chance = "" if ranked else f"{100 * figures['chance'][direction]['mean']:.1f}"
                    what = f"{direction}, nDCG@5" if ranked else direction
                    of_images.append([f"{pool} ({its['images']:,} images)", what, stage, *_cells(values, dims), chance])
        for stage, figures in _having(stages, pool):
            if values := figures.get("ndcg_at_10"):
                scores = figures.get("spearman", {})
                score = f"{100 * next(iter(scores.values())):.1f}" if scores else ""
                of_texts.append([f"{pool} ({its['targets']:,} targets)", stage, *_cells(values, dims), score])
    columns = [f"{dim} dims" for dim in dims]
    parts = [
        (of_images, ["pool", "recall@5, %", "after", *columns, "blind guess"], 3),
        (of_texts, ["text pairs, nDCG@10, %", "after", *columns, "Spearman"], 2),
    ]
    if list(stages) == [""]:
        parts = [
            ([[*r[: n - 1], *r[n:]] for r in rows], [*header[: n - 1], *header[n:]], n - 1) for rows, header, n in parts
        ]
    return "\n\n".join(_align([header, *rows], words) for rows, header, words in parts if rows)


def _having(stages: dict[str, dict[str, Any]], pool: str) -> list[tuple[str, dict[str, Any]]]:
    return [(stage, pools[pool]) for stage, pools in stages.items() if pool in pools]


def _by_dim(figures: dict[str, Any]) -> dict[str, Any]:
    return figures.get("ndcg_at_10") or next(iter(figures["recall_at_5"].values()))


def _cells(by_dim: dict[str, dict[str, float]], dims: list[int]) -> list[str]:
    return [f"{100 * by_dim[str(d)]['mean']:.1f}" if str(d) in by_dim else "" for d in dims]


def languages_table(pools: dict[str, Any], direction: str) -> str:
    """By language, at the full width: recall@5 of images in one direction, nDCG@10 of texts; in percent."""
    rows = [["pool", "language", "figure", "%"]]
    for pool, figures in pools.items():
        texts = "ndcg_at_10" in figures
        by_dim = figures["ndcg_at_10"] if texts else figures["recall_at_5"].get(direction, {})
        for language, value in next(iter(by_dim.values()), {}).items():
            rows.append([pool, language, "nDCG@10" if texts else f"{direction}, recall@5", f"{100 * value:.1f}"])
    return _align(rows, 3)


def write_report(recipe: Recipe) -> tuple[Path, str]:
    """Gathers `evaluation.json` of each stage of a run into `report.json`; returns its path, and the table with what is
    to be said about it.

    Raises:
        UserError: no stage of the run has been evaluated; names the commands that do it.
    """
    from stage_trainer.run.start import summary

    run = Path(recipe.output)
    stages: dict[str, dict[str, Any]] = {}
    parts: dict[str, Any] = {}
    notes = []
    numbers = sorted(int(p.name[5:]) for p in run.glob("stage*") if p.name[5:].isdigit())  # not what was moved aside
    for number in numbers:
        directory = run / f"stage{number}"
        masked = number <= len(recipe.stages) and recipe.stage(number).masked
        if masked or not (saved := all_saved(directory)):
            continue
        again = f"stage-trainer evaluate {_words(directory, recipe.corpus)}"
        if not (path := directory / EVALUATION).exists():
            notes.append(f"stage {number} has not been evaluated: {again}")
            continue
        stages[directory.name] = _read(path)
        parts[directory.name] = summary(directory)
        measured = {figures.get("checkpoint", saved[-1].path.name) for figures in stages[directory.name].values()}
        if measured != {saved[-1].path.name}:
            notes.append(f"stage {number} was trained on after {', '.join(sorted(measured))} was evaluated: {again}")
    if not stages:
        hint = "\n".join(notes) or "It has no trained stage of two towers; train one: bash launch/stage1.sh --recipe …"
        raise UserError(f"there is nothing to report of {run} yet.\n{hint}")
    if (timings := run / "timings.json").exists():
        parts["commands"] = json.loads(timings.read_text())
    report = {"recipe": recipe.name, "seed": recipe.seed, "versions": versions(), "parts": parts, "stages": stages}
    target = run / "report.json"
    write_whole(target, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return target, "\n".join([stages_table(stages), *(["", *notes] if notes else [])])


def _read(path: Path) -> dict[str, Any]:
    try:
        pools = json.loads(path.read_text())
        if not stages_table({"": pools}):
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{path} is not what `stage-trainer evaluate` writes ({error!r}); evaluate the stage again"
        ) from error
    return pools


def next_steps(recipe: Recipe, number: int) -> str:
    """The commands that a person may want once stage `number` is complete."""
    directory = recipe.stage_directory(number)
    lines = []
    if number < len(recipe.stages):
        following = number + 1
        lines.append(
            f"  stage {following}:  launch/stage{following}.sh, or --stage {following}, in place of stage {number}"
        )
    if recipe.stage(number).masked:
        lines.append(f"  use it:   name {directory}/step-…/model as model.text_weights of a recipe")
    else:
        try:
            find(recipe.corpus)
            data = recipe.corpus
        except UserError:
            data = "FOLDER-OF-HELD-OUT-DATA"
        lines += [
            f"  figures:  stage-trainer evaluate {_words(directory, data)}",
            f"  picture:  stage-trainer search {_words(directory, data)}",
            f"  model:    stage-trainer export {_words(directory, 'my-model')}",
        ]
    lines.append(f"  curves:   tensorboard --logdir {_words(recipe.output)}   (first the page Custom Scalars)")
    return "\n".join(["what next:", *lines])


def _words(*words: object) -> str:
    return shlex.join(map(str, words))


def _align(rows: Sequence[Sequence[str]], words: int) -> str:
    """Columns as wide as they need to be, the first `words` to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
