"""What a stage would be, without doing it: the full model on the meta device, its settings and where they come from."""

from __future__ import annotations

import dataclasses

from stage_trainer.build import empty_model
from stage_trainer.recipe_file import Loaded, flatten


def dry_run(loaded: Loaded, number: int) -> str:
    """The text that `stage-trainer train --dry-run` prints."""
    recipe = loaded.recipe
    stage = recipe.stage(number)
    model = empty_model(recipe, number)
    text = sum(p.numel() for p in model.text.parameters())
    vision = sum(p.numel() for p in model.vision.parameters())
    pixels = stage.resolution[-1][1]
    adapter = " with adapter" if model.text.config.adapters else ""
    lines = [
        f"{recipe.name}, stage {number} of {len(recipe.stages)}: {stage.steps:,} steps",
        "",
        "parameters",
        f"  {text:>15,}  text{adapter}",
        f"  {vision:>15,}  vision at {pixels} px, a grid of {' × '.join(map(str, model.vision.config.grid))} patches",
        f"  {text + vision:>15,}  together, without the two temperatures",
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
    """A value is the paper's if the recipe states it without `!ours`, on itself and on all that contains it."""
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
