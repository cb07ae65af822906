"""`train --dry-run`: a stage's parameters, on the meta device, and its settings with their origin."""

from __future__ import annotations

import dataclasses

from stage_trainer.recipe.read import Loaded, flatten
from stage_trainer.tasks import make_task
from stage_trainer.weights import absent


def dry_run(loaded: Loaded, number: int) -> str:
    """The text that `stage-trainer train --dry-run` prints."""
    recipe = loaded.recipe
    stage = recipe.stage(number)
    task = make_task(recipe, number)
    task.check_configs()
    lines = [
        f"{recipe.name}, stage {number} of {len(recipe.stages)}: {stage.steps:,} steps",
        "",
        "parameters",
        *[f"  {count:>15,}  {what}" for count, what in task.parameter_counts(task.empty_model())],
        *[
            f"  ({name} is not on this machine: its sizes are the recipe's, or else the towers' defaults)"
            for name in absent(recipe.model)
        ],
        "",
        "settings" + (f"   (paper: {recipe.paper})" if recipe.paper else ""),
    ]
    everything = {
        "model": dataclasses.asdict(recipe.model),
        "optimizer": dataclasses.asdict(recipe.optimizer),
        "precision": recipe.precision,
        f"stages.{number}": dataclasses.asdict(stage),
    }
    for path, value in flatten(everything).items():
        origin = _origin(path.replace(f"stages.{number}.", f"stages.{number - 1}.", 1), loaded) if recipe.paper else ""
        shown = path.removeprefix(f"stages.{number}.")
        lines.append(f"  {origin:<12}{shown:<34} {_plain(value)}".rstrip())
    return "\n".join(lines)


def _origin(path: str, loaded: Loaded) -> str:
    """A value is the paper's if the recipe states it without `!ours` on it or on anything that contains it."""
    parts = path.split(".")
    ours = any(".".join(parts[: i + 1]) in loaded.ours for i in range(len(parts)))
    inside = any(mark.startswith(path + ".") for mark in loaded.ours)
    stated = any(path == s or path.startswith(s + ".") or s.startswith(path + ".") for s in loaded.stated)
    if not stated or ours:
        return "our choice"
    return "mixed" if inside else "paper"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
