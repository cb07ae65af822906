"""report.json: the evaluations of all stages of a run, beside what they cost."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from stage_trainer.checkpoint.load import all_saved
from stage_trainer.errors import UserError
from stage_trainer.evaluation.tables import Pools, precision_table, stages_table
from stage_trainer.files import read_json, write_whole
from stage_trainer.recipe import Recipe

EVALUATION = "evaluation.json"


def write_report(recipe: Recipe, versions: dict[str, str]) -> tuple[Path, str]:
    """Collects the `evaluation.json` of each stage of a run in `report.json`; returns its path, and a table with notes.

    Args:
        versions: of the installed libraries.

    Raises:
        UserError: no stage of the run has been evaluated; names the commands that do it.
    """
    run = Path(recipe.output)
    stages: dict[str, Pools] = {}
    parts: dict[str, object] = {}
    notes = []
    numbers = sorted(int(p.name[5:]) for p in run.glob("stage*") if p.name[5:].isdigit())  # not what was moved aside
    for number in numbers:
        directory = run / f"stage{number}"
        encodes = number > len(recipe.stages) or recipe.stage(number).kind.both_towers
        if not encodes or not (saved := all_saved(directory)):
            continue
        again = shlex.join(["stage-trainer", "evaluate", str(directory), recipe.corpus])
        if not (path := directory / EVALUATION).exists():
            notes.append(f"stage {number} has not been evaluated: {again}")
            continue
        stages[directory.name] = read_figures(path)
        state = saved[-1].state()
        parts[directory.name] = {k: state.get(k) for k in ("step", "seconds", "peak_memory_bytes", "versions")}
        measured = {figures.get("checkpoint", saved[-1].path.name) for figures in stages[directory.name].values()}
        if measured != {saved[-1].path.name}:
            notes.append(f"stage {number} was trained on after {', '.join(sorted(measured))} was evaluated: {again}")
    if not stages:
        hint = "\n".join(notes) or "It has no trained stage of two towers; train one: bash launch/stage1.sh --recipe …"
        raise UserError(f"there is nothing to report of {run} yet.\n{hint}")
    if (timings := run / "timings.json").exists():
        try:
            parts["commands"] = read_json(timings)
        except ValueError as error:
            raise UserError(f"{timings} cannot be read ({error}); move it away") from error
    report = {"recipe": recipe.name, "seed": recipe.seed, "versions": versions, "parts": parts, "stages": stages}
    target = run / "report.json"
    write_whole(target, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return target, "\n".join([stages_table(stages), *(["", *notes] if notes else [])])


def read_figures(path: Path) -> Pools:
    """What `stage-trainer evaluate` wrote into an evaluation.json.

    Raises:
        UserError: it is damaged, or something else.
    """
    try:
        pools: Pools = read_json(path)
        if not stages_table({"": pools}):
            raise ValueError("it is empty")
        precision_table(pools)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{path} is not what `stage-trainer evaluate` writes ({error!r}); evaluate the stage again"
        ) from error
    return pools
