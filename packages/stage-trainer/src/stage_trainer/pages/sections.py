"""What a report shows of runs: charts and tables from what their folders hold."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from stage_trainer.evaluation import tables
from stage_trainer.evaluation.retrieval import DIRECTIONS
from stage_trainer.evaluation.tables import Figures
from stage_trainer.pages import charts
from stage_trainer.pages.charts import Bars, Chart, Line
from stage_trainer.pages.runs import Run, StageFolder

_TITLE = re.compile(r"validation_(recall|ndcg)_at_(\d+)_(.+)/([^/]+)")
_HEADLINES = ("text to image", "image to text", "text to English text", "mean")
_OTHER = re.compile(r"validation_(.+)/all")  # a loss, Spearman's correlation


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; the first `words` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def training(runs: Sequence[Run]) -> list[Chart]:
    """Losses, temperatures, biases of sigmoid losses, and what was measured on held-out data meanwhile."""
    names = _tags(runs)
    found = [
        _over_steps(runs, tag, f"{what}, {tag.partition('/')[2]}", {tag: ""})
        for what in ("loss", "temperature", "bias")
        for tag in names
        if tag.startswith(f"{what}/")
    ]
    pools: dict[tuple[str, str], dict[str, str]] = {}
    for tag in names:
        if (m := _TITLE.fullmatch(tag)) and m[4] in _HEADLINES:
            measure = f"{'nDCG' if m[1] == 'ndcg' else m[1]}@{m[2]}"
            pools.setdefault((f"{measure} while it trained, %, {m[3]}", f"{m[1]}-{m[3]}"), {})[tag] = m[4]
        elif m := _OTHER.fullmatch(tag):
            pools[m[1].replace("_", " ") + " while it trained", m[1]] = {tag: ""}
    found += [_over_steps(runs, name, title, tags) for (title, name), tags in pools.items()]
    return [chart for chart in found if chart]


def modality_gap(runs: Sequence[Run]) -> list[Chart]:
    """The distance between the means of images and of texts, over training."""
    tags = {tag: tag.partition("/")[2] for tag in _tags(runs) if tag.startswith("modality_gap/")}
    chart = _over_steps(runs, "modality_gap", "modality gap", tags) if tags else None
    return [chart] if chart else []


def throughput(runs: Sequence[Run]) -> list[Chart]:
    """Samples a second, and what part of the time was spent on waiting for data."""
    shown = {
        "speed/samples_per_second": "samples a second",
        "speed/data_wait_share": "time that waits for data, %",
        "speed/mfu": "model FLOPs utilisation, %",
    }
    there = set(_tags(runs))
    found = [_over_steps(runs, tag, title, {tag: ""}) for tag, title in shown.items() if tag in there]
    return [chart for chart in found if chart]


def costs(runs: Sequence[Run]) -> Table:
    """What each stage took, and the predicted time of a step beside the measured one."""
    head = ["stage", "steps", "hours in steps", "peak memory", "samples/s", "s/step", "predicted", "off by", "skipped"]
    rows = []
    for run in runs:
        for stage in run.stages:
            state = stage.trained.state
            speed, seconds = _typical(stage, "speed/samples_per_second"), _typical(stage, "speed/step_seconds")
            predicted = _typical(stage, "speed/step_seconds_predicted")
            rows.append([
                _named(runs, run, stage),
                f"{stage.steps:,}",
                f"{state['seconds'] / 3600:.2f}" if "seconds" in state else "–",
                f"{state['peak_memory_bytes'] / 2**30:.1f} GiB" if state.get("peak_memory_bytes") else "–",
                f"{speed:,.0f}" if speed else "–",
                f"{seconds:.3g}" if seconds else _from_counts(stage),
                f"{predicted:.3g}" if predicted else "–",
                f"{seconds / predicted - 1:+.0%}" if seconds and predicted else "–",
                f"{state['skipped']:,}" if "skipped" in state else "–",
            ])  # fmt: skip
    return Table(head, rows)


def figures(runs: Sequence[Run]) -> Table | None:
    """Every stage's figures at the full width, in percent, means over languages."""
    stages = [(run, stage) for run in runs for stage in run.evaluated]
    rows: dict[tuple[str, str], dict[int, float]] = {}
    guesses: dict[tuple[str, str], float] = {}
    for column, (_, stage) in enumerate(stages):
        for name, pool in stage.pools.items():
            for measure, by_dim, chance in measures(pool):
                if (value := _number(_full(by_dim).get("mean"))) is not None:
                    rows.setdefault((name, measure), {})[column] = value
                if (guess := _number((chance or {}).get("mean"))) is not None:
                    guesses[name, measure] = guess
            if (value := _number(next(iter(pool.get("spearman", {}).values()), None))) is not None:
                rows.setdefault((name, "Spearman"), {})[column] = value
    if not rows:
        return None
    head = ["held-out data", "figure, %", *(_named(runs, run, stage) for run, stage in stages), "blind guess"]
    cells = [
        [*row, *(_percent(by_column.get(n)) for n in range(len(stages))), _percent(guesses.get(row))]
        for row, by_column in rows.items()
    ]
    return Table(head, cells, words=2)


def matryoshka(runs: Sequence[Run]) -> list[Chart]:
    """The figures of each run's last evaluated stage over the dims that are kept of a vector."""
    lines: dict[str, list[Line]] = {}
    guesses: dict[str, list[float]] = {}
    for number, run in enumerate(runs):
        for kind, (pool, measure, by_dim, chance) in _of_last(run):
            values = [(int(dim), 100 * v) for dim, of in by_dim.items() if (v := _number(of.get("mean"))) is not None]
            if len(values) > 1:
                x, y = (np.array(column, dtype=np.float64) for column in zip(*sorted(values), strict=True))
                lines.setdefault(measure, []).append(Line(_label(runs, run, pool), x, y, number, kind))
                if (guess := _number((chance or {}).get("mean"))) is not None:
                    guesses.setdefault(measure, []).append(100 * guess)
    drawn = []
    for measure, of in lines.items():
        levels = guesses.get(measure, [])
        one = levels[0] if levels and max(levels) - min(levels) < 0.05 else None  # else there is a level for each pool
        drawn.append(charts.by_dim(f"matryoshka-{_slug(measure)}", measure, of, one, len(runs)))
    return [chart for chart in drawn if chart]


def precisions(runs: Sequence[Run]) -> Table | None:
    """The figures of each run's last evaluated stage with candidates stored in fewer bits, if they were measured."""
    pools: tables.Pools = {}
    for run in runs:
        if run.evaluated:
            pools |= {_label(runs, run, name): pool for name, pool in run.evaluated[-1].pools.items()}
    head, rows = tables.precision_rows(pools)
    return Table(head, rows, words=3) if rows else None


def languages(runs: Sequence[Run]) -> list[Chart]:
    """text→image (of texts nDCG) by language at the full width, of each run's last evaluated stage."""
    found: dict[tuple[str, str], dict[int, Mapping[str, float]]] = {}
    guesses: dict[tuple[str, str], Mapping[str, float]] = {}
    for number, run in enumerate(runs):
        for _, (pool, measure, by_dim, chance) in _of_last(run):
            if measure.startswith(DIRECTIONS[0]) or "→" not in measure:
                found.setdefault((pool, measure), {})[number] = _full(by_dim)
                guesses.setdefault((pool, measure), chance or {})
    drawn = []
    for (pool, measure), by_run in found.items():
        first = next(iter(by_run.values()))
        labels = {language for of in by_run.values() for language in of if language != "mean"}
        order = sorted(labels, key=lambda language: (-(_number(first.get(language)) or 0.0), language))
        series = [Bars(runs[n].name, _in_percent(of, order), n) for n, of in by_run.items()]
        title = f"{pool}: {measure}"
        guess = _in_percent(guesses[pool, measure], order)
        drawn.append(charts.bars(f"languages-{_slug(title)}", title, order, series, guess))
    return [chart for chart in drawn if chart]


def data_seen(runs: Sequence[Run]) -> Table | None:
    """The texts that each stage has drawn by source, and how many of them were cut."""
    rows = []
    for run in runs:
        for stage in run.stages:
            drawn = stage.trained.state.get("texts_drawn", {})
            cut = stage.trained.state.get("texts_cut", {})
            longest = stage.trained.setting("stage.max_tokens")
            for source, count in drawn.items():
                lost = cut.get(source, 0)
                share = f"{count / sum(drawn.values()):.0%}" if count else "–"
                cells = [f"{count:,}", share, f"{lost:,}", f"{lost / count:.1%}" if count else "–", str(longest)]
                rows.append([_named(runs, run, stage), source, *cells])
    head = ["stage", "source", "texts drawn", "share", "cut", "share cut", "at tokens"]
    return Table(head, rows, words=2) if rows else None


def corrupt(runs: Sequence[Run]) -> Table | None:
    """The reasons for which samples were replaced, most frequent first."""
    counts: dict[tuple[str, str], list[Any]] = {}
    for run in runs:
        for stage in run.stages:
            for entry in stage.corrupt:
                reason = " ".join(str(entry.get("reason", "no reason is given")).split())[:160]
                counts.setdefault((_named(runs, run, stage), reason), []).append(entry)
    rows = [
        [stage, reason, f"{entries[0].get('shard', '')} {entries[0].get('key', '')}", f"{len(entries):,}"]
        for (stage, reason), entries in sorted(counts.items(), key=lambda item: -len(item[1]))
    ]
    return Table(["stage", "reason", "the first one", "samples"], rows, words=3) if rows else None


def measures(pool: Figures) -> Iterator[tuple[str, Mapping[str, Mapping[str, float]], Mapping[str, float] | None]]:
    """(name, dim → language → value, language → chance or None) of everything measured on a pool."""
    for name, by_dim in tables.measures(pool):
        direction, _, measure = name.partition(", ")
        yield name, by_dim, pool.get("chance", {}).get(direction) if measure == "recall@5" else None


def lacking(run: Run) -> list[str]:
    """What of a report's parts a run gives nothing for, beside what `Run.lacks` says."""
    found = []
    searched = [stage for stage in run.stages if stage.both_towers]
    tags = {tag for stage in run.stages for tag, curve in stage.curves.items() if len(curve.finite)}
    of_pairs = {tag for stage in searched for tag in stage.curves}
    if tags:
        wanted = {"loss/": "losses", "speed/samples_per_second": "throughput"}
        if searched:
            wanted |= {"temperature/": "temperatures", "modality_gap/": "modality gap (evaluation.every measures it)"}
        found += [f"no {what} in its curves" for of, what in wanted.items() if not any(t.startswith(of) for t in tags)]
    if of_pairs and "speed/step_seconds_predicted" not in tags:
        found.append(
            "no predicted time of a step: there is one if the recipe has gradient_cache: auto and the device's speed "
            "is known; `stage-trainer plan` predicts it without a run"
        )
    for stage in run.stages:
        for tag, curve in stage.curves.items():
            if bad := len(curve.values) - len(curve.finite):
                found.append(f"{stage.name}: {tag} is not finite at {bad:,} of {len(curve.values):,} steps")
    evaluated = [measure for stage in run.evaluated for pool in stage.pools.values() for measure in measures(pool)]
    if not evaluated:
        found.append("no figures: so no Matryoshka curve and no languages")
    elif not any(len(by_dim) > 1 for _, by_dim, _ in evaluated):
        found.append("no Matryoshka curve: it was evaluated at one dim alone")
    if not any(stage.trained.state.get("texts_drawn") for stage in run.stages):
        found.append("no counts of the data that it has seen")
    return found


def _of_last(run: Run) -> Iterator[tuple[int, tuple[str, str, Mapping[str, Any], Mapping[str, float] | None]]]:
    """(the pool's number, (pool, measure, dim → language → value, chance)) of the last evaluated stage."""
    if run.evaluated:
        for kind, (name, pool) in enumerate(run.evaluated[-1].pools.items()):
            for measure, by_dim, chance in measures(pool):
                yield kind, (name, measure, by_dim, chance)


def _over_steps(runs: Sequence[Run], name: str, title: str, tags: Mapping[str, str]) -> Chart | None:
    """A chart of scalars, {tag: what it is called among the others}, over the steps of all stages in turn; shares in
    percent, if the title says so."""
    lines, ends, scale = [], set(), 100 if "%" in title else 1
    for number, run in enumerate(runs):
        for kind, (tag, called) in enumerate(tags.items()):
            x, y, start = [], [], 0
            for stage in run.stages:
                if (curve := stage.curves.get(tag)) is not None and len(curve.steps):
                    x += [*(curve.steps + start), math.nan]  # a gap between two stages
                    y += [*(scale * curve.values), math.nan]
                start += stage.steps
                ends.add(start)
            if x:
                label = _label(runs, run, called)
                lines.append(Line(label, np.array(x[:-1]), np.array(y[:-1], dtype=np.float64), number, kind))
    last = max((sum(stage.steps for stage in run.stages) for run in runs), default=0)
    return charts.curves(_slug(name), title, lines, sorted(ends - {last}), len(runs))


def _tags(runs: Sequence[Run]) -> list[str]:
    return sorted({tag for run in runs for stage in run.stages for tag in stage.curves})


def _typical(stage: StageFolder, tag: str) -> float | None:
    """The median of a scalar, without the first entry, in which the towers may have been compiled."""
    curve = stage.curves.get(tag)
    values = [] if curve is None else [*curve.values[1:]] or [*curve.values]
    values = [float(value) for value in values if math.isfinite(value)]
    return median(values) if values else None


def _from_counts(stage: StageFolder) -> str:
    seconds, steps = stage.trained.state.get("seconds"), stage.trained.state.get("step")
    return f"{seconds / steps:.3g}" if seconds and steps else "–"


def _full(by_dim: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """What was found at the full width."""
    return by_dim[max(by_dim, key=int)] if by_dim else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _in_percent(values: Mapping[str, float], order: Sequence[str]) -> np.ndarray:
    found = [_number(values.get(name)) for name in order]
    return np.array([math.nan if value is None else 100 * value for value in found])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _named(runs: Sequence[Run], run: Run, stage: StageFolder) -> str:
    return stage.name if len(runs) == 1 else f"{run.name} {stage.name}"


def _label(runs: Sequence[Run], run: Run, called: str) -> str:
    """What a line is called: nothing that all lines of a chart share."""
    return called if len(runs) == 1 else f"{run.name} {called}".strip()


def _slug(name: str) -> str:
    """For a file's name and an id; a digest tells names apart that differ in other letters alone."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("→", "-to-")).strip("-")[:80]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
