"""A report as one HTML page that needs nothing else, and its pictures as PNG files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import write_file

from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import DIRECTIONS
from stage_trainer.files import write_whole, writing
from stage_trainer.pages import sections
from stage_trainer.pages.charts import COLORS, Chart, matplotlib_needed
from stage_trainer.pages.gallery import Gallery, gallery_of
from stage_trainer.pages.runs import Run, read_runs
from stage_trainer.pages.sections import Table
from stage_trainer.recipe.limits import MAX_PIXELS

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Part:
    """A section of the page: what it says, and what it shows."""

    title: str
    about: str
    charts: Sequence[Chart] = ()
    table: Table | None = None
    folded: bool = False

    @property
    def empty(self) -> bool:
        return not self.charts and self.table is None


def write_page(
    directories: Sequence[Path],
    out: Path,
    say: Callable[[str], None],
    *,
    data: Path | None = None,
    searched: int = 1000,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Path, int, list[str]]:
    """Writes the page of some runs to `out`, and its pictures into a folder beside it.

    Args:
        data: held-out images for the searches; None: those that each run was evaluated on.
        searched: images of a data set that are searched at most; 0: no searches.

    Returns:
        (the folder of pictures, their number, what the runs lack).

    Raises:
        UserError: a folder holds no run, matplotlib or jinja2 is not installed, or the page cannot be written.
    """
    matplotlib_needed()
    runs = read_runs(directories)
    galleries, lacks = [], {run.name: [*run.lacks, *sections.lacking(run)] for run in runs}
    for run in runs if searched else ():
        try:
            galleries.append(gallery_of(run, data, searched, say, max_pixels=max_pixels))
        except UserError as error:
            lacks[run.name].append(f"no searches: {error}")
    found, made = _found(runs), _made(runs)
    html = _html(runs, (found, made), galleries, lacks, shlex.join(["stage-trainer", "report", *map(str, directories)]))
    pictures = {f"{chart.name}.png": chart.png for part in (*found, *made) for chart in part.charts}
    pictures |= {f"searches-{number}.png": gallery.png for number, gallery in enumerate(galleries, 1)}
    folder = out.with_name(f"{out.stem}-pictures")
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for name, content in pictures.items():
            write_file(folder / name, content)
    write_whole(out, html)
    return folder, len(pictures), [f"{run}: {what}" for run, of in lacks.items() for what in of]


def _found(runs: Sequence[Run]) -> list[Part]:
    """What the runs reached: before the searches."""
    parts = [
        Part("Training", "Losses and temperatures over the steps of all stages; dotted lines end a stage. A pale line "
             "has every entry, a strong one over it their running mean.", sections.training(runs)),
        Part("Figures", "On held-out data after each stage, at the full width, means over languages. A blind guess is "
             "what chance would reach.", table=sections.figures(runs)),
        Part("Matryoshka", "The last evaluated stage, with vectors cut to their first dims"
             + (", and stored in fewer bits." if (stored := sections.precisions(runs)) else "."),
             sections.matryoshka(runs), stored),
        Part("Languages", "The last evaluated stage, by the language of the query. The dark mark is a blind guess.",
             sections.languages(runs)),
    ]  # fmt: skip
    return [part for part in parts if not part.empty]


def _made(runs: Sequence[Run]) -> list[Part]:
    """How they reached it: after the searches."""
    parts = [
        Part("Modality gap", "The distance between the mean of the images and the mean of the texts, at length one.",
             sections.modality_gap(runs)),
        Part("Speed and plan", "Medians of each stage; the predicted time of a step beside the measured one.",
             sections.throughput(runs), sections.costs(runs)),
        Part("Data seen", "Texts by source, captions among them, and those that lost their end to max_tokens.",
             table=sections.data_seen(runs)),
        Part("Corrupt samples", "Each was replaced by another; corrupt.jsonl in the stage's folder lists them.",
             table=sections.corrupt(runs)),
        Part("Settings", "Of every stage, as its checkpoint has them. Marked rows differ.", table=_settings(runs),
             folded=True),
        Part("Versions", "With which each stage was trained last.", table=_versions(runs), folded=True),
    ]  # fmt: skip
    return [part for part in parts if not part.empty]


def _settings(runs: Sequence[Run]) -> Table | None:
    return _side_by_side(runs, lambda state: state.get("settings", {}))


def _versions(runs: Sequence[Run]) -> Table | None:
    return _side_by_side(runs, lambda state: state.get("versions", {}))


def _side_by_side(runs: Sequence[Run], of: Callable[[Any], dict[str, Any]]) -> Table | None:
    """A row for each key, a column for each stage."""
    stages = [(run, stage) for run in runs for stage in run.stages if of(stage.trained.state)]
    if not stages:
        return None
    head = ["", *(f"{run.name} {stage.name}" if len(runs) > 1 else stage.name for run, stage in stages)]
    columns = [of(stage.trained.state) for _, stage in stages]
    keys = sorted({key for column in columns for key in column})
    rows = [[key, *(_plain(column.get(key, "–")) for column in columns)] for key in keys]
    return Table(head, rows, words=len(head))


def _plain(value: object) -> str:
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _html(
    runs: Sequence[Run],
    parts: tuple[Sequence[Part], Sequence[Part]],
    galleries: Sequence[Gallery],
    lacks: dict[str, list[str]],
    command: str,
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    missing: dict[str, list[str]] = {}
    for name, of in lacks.items():
        for what in of:
            missing.setdefault(what, []).append(name)
    html = environment.get_template(_TEMPLATE).render(
        title=" · ".join(run.name for run in runs),
        runs=[{"name": run.name, "facts": _facts(run), "color": n % len(COLORS)} for n, run in enumerate(runs)],
        found=parts[0],
        made=parts[1],
        galleries=galleries,
        missing=missing,
        command=command,
    )
    return html.encode(errors="backslashreplace").decode()  # of names that are no UTF-8


def _facts(run: Run) -> list[tuple[str, str]]:
    """What a run is, in a few figures."""
    states = [stage.trained.state for stage in run.stages]
    facts = [("stages", str(len(run.stages))), ("steps", f"{sum(stage.steps for stage in run.stages):,}")]
    if hours := sum(state.get("seconds", 0) for state in states) / 3600:
        facts.append(("hours in steps", f"{hours:.2f}"))
    if texts := sum(sum(state.get("texts_drawn", {}).values()) for state in states):
        facts.append(("texts seen", f"{texts:,}"))
    facts.append(("corrupt samples", f"{sum(len(stage.corrupt) for stage in run.stages):,}"))
    pools = run.evaluated[-1].pools if run.evaluated else {}
    for name, pool in pools.items():
        by_dim = pool.get("recall_at_5", {}).get(DIRECTIONS[0], {})
        if by_dim:
            facts.append((f"recall@5, {DIRECTIONS[0]}, {name}", f"{100 * by_dim[max(by_dim, key=int)]['mean']:.1f} %"))
    return facts
