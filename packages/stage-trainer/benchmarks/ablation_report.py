"""From the ablations' measurements to verdicts, tables and charts.

Two runs are compared item by item: of each item the mean over the seeds that both have, then the mean difference with a
bootstrap interval over items and a sign-flip permutation test (scipy). A finding *shows* if the interval is on its side
of zero, the test's p times the number of tests (Bonferroni) is below 0.05 and every seed has the sign. With fewer than
three seeds it is at most a tendency.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ablation_measure import Measured
from scipy import stats

Found = Mapping[int, Mapping[str, Measured]]
RESAMPLES = 9999
SEEDS = 3
NEITHER = {True: "does not show", False: "not sure"}
NAMES = {"together/1": "multi-task", "unified/1": "unified batch"}


@dataclass(frozen=True)
class Question:
    """Whether `metric` is higher in the run `better` than in `worse`; both are "RUN/STAGE" or "RUN/STAGE@DIM"."""

    finding: str
    metric: str
    better: str
    worse: str


TO_IMAGES, TO_TEXTS, TEXTS = "emoji text→image", "emoji image→text", "emoji text→text"
QUESTIONS = [
    *(Question("stages: 2 adds to 1", metric, "multi-task/2", "multi-task/1") for metric in (TO_IMAGES, TEXTS)),
    Question("stages: 3 adds to 2 on texts", TEXTS, "multi-task/3", "multi-task/2"),
    Question("stages: 3 gives back cross-modal recall", TO_IMAGES, "multi-task/2", "multi-task/3"),
    *(
        Question(f"Matryoshka: 1024 above {paper}", metric, "matryoshka/2@128", f"matryoshka/2@{dim}")
        for dim, paper in ((96, 768), (64, 512), (32, 256), (16, 128), (8, 64))
        for metric in (TO_IMAGES, TEXTS)
    ),
    *(
        Question(f"resolution: {b} above {a}", f"nDCG@5 of pages by {kind}", f"pages-{high}/2", f"pages-{low}/2")
        for (low, a), (high, b) in (((36, 224), (60, 384)), ((60, 384), (84, 512)), ((84, 512), (120, 768)))
        for kind in ("figures", "titles")
    ),
    *(
        Question("multi-task above unified batch", metric, "together/1", "unified/1")
        for metric in (TO_IMAGES, TO_TEXTS, TEXTS)
    ),
    *(
        Question(f"trained above frozen {tower} tower", metric, "multi-task/2", f"frozen-{tower}/2")
        for tower in ("image", "text")
        for metric in (TO_IMAGES, TEXTS)
    ),
]


@dataclass(frozen=True)
class Answer:
    """Means in percent over seeds and items, and their difference, with what says how sure it is."""

    finding: str
    metric: str
    better: str
    worse: str
    seeds: int
    items: int
    mean_better: float
    mean_worse: float
    spread_better: float  # standard deviation over seeds; nan of one seed
    spread_worse: float
    difference: float
    low: float
    high: float
    p: float
    verdict: str


def values(measured: Measured, metric: str, dim: str) -> np.ndarray | None:
    """A value for each item, at the width `dim` or, if it is "", at the largest; None if it was not measured."""
    names = {name.rpartition(", ")[2]: name for name in measured.items if name.rpartition(", ")[0] == metric}
    if not names or (dim and dim not in names):
        return None
    return measured.items[names[dim or max(names, key=int)]]


def by_seed(found: Found, at: str, metric: str) -> dict[int, np.ndarray]:
    run, _, dim = at.partition("@")
    read = {seed: values(of[run], metric, dim) for seed, of in found.items() if run in of}
    return {seed: of for seed, of in read.items() if of is not None}


def answer(found: Found, question: Question, tests: int) -> Answer | None:
    """None if no seed has both runs."""
    better = by_seed(found, question.better, question.metric)
    worse = by_seed(found, question.worse, question.metric)
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return None
    left, right = (100 * np.stack([of[seed] for seed in seeds]) for of in (better, worse))
    differences = (left - right).mean(axis=0)
    low, high, p = paired(differences)
    means, others = left.mean(axis=1), right.mean(axis=1)
    sure = low > 0 and p * tests < 0.05 and bool((means > others).all())
    against = high < 0 and p * tests < 0.05 and bool((means < others).all())
    words = ("shows", "the opposite shows") if len(seeds) >= SEEDS else ("a tendency", "a tendency to the opposite")
    verdict = words[0] if sure else words[1] if against else NEITHER[len(seeds) >= SEEDS]
    one, other = (float(of.std(ddof=1)) if len(seeds) > 1 else float("nan") for of in (means, others))
    return Answer(
        question.finding, question.metric, question.better, question.worse, len(seeds), len(differences),
        float(means.mean()), float(others.mean()), one, other, float(differences.mean()), low, high, p, verdict,
    )  # fmt: skip


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """(low, high, p): a 95 % bootstrap interval of the mean difference `[N]` over items, and the two-sided p of a
    permutation test in which each item's difference may have either sign."""
    if not differences.any():
        return 0.0, 0.0, 1.0
    rng = np.random.default_rng(0)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng, batch=500
    ).confidence_interval
    test = stats.permutation_test(
        (differences, np.zeros_like(differences)), lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=RESAMPLES, rng=rng, batch=500,
    )  # fmt: skip
    return float(interval.low), float(interval.high), float(test.pvalue)


def report(found: Found, table: Path, pictures: Path) -> dict[str, Any]:
    """Writes TABLE.md, TABLE.csv and the charts that there is something for; returns what the JSON holds."""
    given = [answer(found, question, len(QUESTIONS)) for question in QUESTIONS]
    answers = [a for a in given if a]
    missing = sorted({q.finding for q, a in zip(QUESTIONS, given, strict=True) if not a})
    table.parent.mkdir(parents=True, exist_ok=True)
    table.with_suffix(".md").write_text(markdown(answers, missing))
    with table.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(list(Answer.__dataclass_fields__))
        writer.writerows(list(asdict(a).values()) for a in answers)
    pictures.mkdir(parents=True, exist_ok=True)
    draw(found, pictures)
    means = {
        str(seed): {run: {name: round(100 * float(v.mean()), 3) for name, v in m.items.items()} | m.scalars
                    for run, m in of.items()}
        for seed, of in found.items()
    }  # fmt: skip
    curves = {str(seed): {run: m.curves for run, m in of.items()} for seed, of in found.items()}
    # JSON has no nan: a spread of one seed is null
    rows = [{k: None if v != v else v for k, v in asdict(a).items()} for a in answers]
    return {"answers": rows, "not_measured": missing, "means": means, "temperatures": curves}


def markdown(answers: list[Answer], missing: list[str]) -> str:
    lines = [
        "| the paper's finding | measured | one | other | difference, 95 % interval | p | seeds | at this scale |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for a in answers:
        one, other = (
            f"{mean:.1f}" + ("" if np.isnan(spread) else f" ± {spread:.1f}")
            for mean, spread in ((a.mean_better, a.spread_better), (a.mean_worse, a.spread_worse))
        )
        between = f"{a.difference:+.1f} ({a.low:+.1f} to {a.high:+.1f})"
        lines.append(
            f"| {a.finding} | {a.metric} | {one} | {other} | {between} | {a.p:.4f} | {a.seeds} | {a.verdict} |"
        )
    if missing:
        lines += ["", f"Not measured: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def draw(found: Found, pictures: Path) -> None:
    """ablations-matryoshka.png, -resolution.png, -stages.png and -temperatures.png, of what has been measured."""
    import matplotlib

    matplotlib.use("Agg")
    widths = ("128", "96", "64", "32", "16", "8")
    pages = ("36", "60", "84", "120")
    lines = {
        "stages": ("stage", {m: [(s, f"multi-task/{s}") for s in "123"] for m in (TO_IMAGES, TO_TEXTS, TEXTS)}),
        "matryoshka": ("dims", {m: [(d, f"matryoshka/2@{d}") for d in widths] for m in (TO_IMAGES, TEXTS)}),
        "resolution": (
            "pixels",
            {f"nDCG@5 of pages by {k}": [(s, f"pages-{s}/2") for s in pages] for k in ("figures", "titles")},
        ),
    }
    for name, (label, of_metric) in lines.items():
        drawn = {
            metric: [(x, [100 * v.mean() for v in values.values()]) for x, at in points
                     if (values := by_seed(found, at, metric))]
            for metric, points in of_metric.items()
        }  # fmt: skip
        if any(len(points) > 1 for points in drawn.values()):
            chart(pictures / f"ablations-{name}.png", label, drawn)
    temperatures(found, pictures / "ablations-temperatures.png")


def chart(path: Path, label: str, lines: Mapping[str, list[tuple[str, list[float]]]]) -> None:
    """Means over seeds, with the standard deviation as error bars."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for metric, points in lines.items():
        spread = [float(np.std(of, ddof=1)) if len(of) > 1 else 0.0 for _, of in points]
        axes.errorbar([x for x, _ in points], [np.mean(of) for _, of in points], spread, marker="o", capsize=3,
                      label=metric)  # fmt: skip
    axes.set(xlabel=label, ylabel="percent", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def temperatures(found: Found, path: Path) -> None:
    """Of the first stage: of both tasks and of the unified batch, a line for each seed.

    The unified batch has one temperature; the other, which no loss uses, stays where it began.
    """
    from matplotlib import pyplot

    drawn = [(run, tag, points) for of in found.values() for run in NAMES if run in of
             for tag, points in of[run].curves.items() if len({value for _, value in points}) > 1]  # fmt: skip
    if not drawn:
        return
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    kinds = sorted({(run, tag) for run, tag, _ in drawn})
    for number, kind in enumerate(kinds):
        for turn, points in enumerate(points for run, tag, points in drawn if (run, tag) == kind):
            label = f"{NAMES[kind[0]]}: {kind[1].rpartition('/')[2]}" if not turn else None
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label)
    axes.set(xlabel="step", ylabel="temperature")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
