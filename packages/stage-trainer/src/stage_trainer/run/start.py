"""Where a stage starts: from its own last checkpoint, from the end of the stage before, or from new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from stage_trainer.build import Model, build_model, load_model, with_text_weights
from stage_trainer.errors import UserError
from stage_trainer.files import free_name
from stage_trainer.recipe import BatchSizes, ModelConfig, Rates, Recipe, Stage, StageData
from stage_trainer.recipe.read import flatten, to_dict
from stage_trainer.run import checkpoint

SO_FAR: dict[str, Any] = {
    "seconds": 0.0, "peak_memory_bytes": 0, "skipped": 0, "best": None, "unmeasured": False, "texts_drawn": {},
    "texts_cut": {},
}  # fmt: skip
"""What a stage counts over all its processes (texts by source), and whether it owes an evaluation; part of a
checkpoint's state."""
_STAGE = Stage(steps=0, max_tokens=0, batch=BatchSizes(), lr=Rates(), data=StageData())
_DEFAULTS = Recipe(name="", output="", corpus="", model=ModelConfig(text={}, tokenizer=""), stages=(_STAGE,))


def starting_point(
    recipe: Recipe, number: int, state: dict[str, Any], tokenizer: Any
) -> tuple[Model, dict[str, Tensor] | None, int]:
    """(model, optimizer state, step): of this stage's newest checkpoint, the stage before, or new.

    Args:
        state: settings and data of this process; takes what the checkpoint counted (`SO_FAR`) and the model that the
            stage grew from.

    Raises:
        UserError: the stage before is not finished, or this one was begun with other settings or data.
    """
    state.update(SO_FAR)
    directory = recipe.stage_directory(number)
    saved = checkpoint.newest_sound(directory)
    before = checkpoint.newest_sound(recipe.stage_directory(number - 1)) if number > 1 else None
    finished = before if before and before.step >= recipe.stage(number - 1).steps else None
    grown_from = f"the model of stage {number - 1}"
    if finished:
        state["data"][grown_from] = finished.model_digest()
    if saved:
        former = saved.state()
        if not finished:  # it may be gone once the next stage has begun
            state["data"] |= {k: v for k, v in former.get("data", {}).items() if k == grown_from}
        # A setting that the release which began the run did not know yet is at its default.
        defaults = {k: v for k, v in settings(_DEFAULTS, 1).items() if k in state["settings"]}
        former["settings"] = {**defaults, **former.get("settings", {})}
        checkpoint.compatible(former, state, directory)
        state.update({name: former.get(name, value) for name, value in SO_FAR.items()})
        return load_model(recipe, number, saved.model), saved.optimizer(), saved.step
    if number == 1:
        return build_model(recipe, number, tokenizer), None, 0
    if not finished:
        needed = recipe.stage(number - 1).steps
        reached = f"stopped at step {before.step} of {needed}" if before else "has not run"
        raise UserError(
            f"stage {number} starts from stage {number - 1}, which {reached} ({recipe.stage_directory(number - 1)}); "
            f"run it first: bash launch/stage{number - 1}.sh"
        )
    if recipe.stage(number - 1).masked and not recipe.stage(number).masked:
        return build_model(with_text_weights(recipe, finished.model), number, tokenizer), None, 0
    carried = finished.optimizer() if recipe.stage(number).carry_optimizer else None
    return load_model(recipe, number, finished.model), carried, 0


def settings(recipe: Recipe, number: int) -> dict[str, Any]:
    """What must not change between two runs of a stage: all that bears on its numbers."""
    how = ("deepspeed", "gradient_cache")  # what they change is rounding
    stage = {k: v for k, v in to_dict(recipe)["stages"][number - 1].items() if k not in how}
    tree = {k: v for k, v in to_dict(recipe).items() if k in ("model", "optimizer", "seed", "precision")}
    # A folder may be moved, also to a URL; what is in it has a fingerprint of its own.
    del tree["model"]["tokenizer"]
    for source in (*stage["data"]["image_text"], *stage["data"]["text"]):
        source["path"] = "/".join(source["path"].partition("?")[0].rstrip("/").split("/")[-2:])
    return flatten({**tree, "stage": stage})


def move_aside(directory: Path) -> None:
    if directory.exists():
        aside = directory.rename(free_name(directory, "old"))
        print(f"the former run now stands in {aside}", flush=True)
