"""Where a stage starts: from its own last checkpoint, from the end of the stage before, or from new weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from text_tower import Tokenizer
from torch import Tensor, nn

from stage_trainer.checkpoint.load import compatible, latest_valid
from stage_trainer.checkpoint.state import RunState
from stage_trainer.errors import UserError
from stage_trainer.files import free_name
from stage_trainer.recipe import BatchSizes, ModelConfig, Rates, Recipe, Stage, StageData
from stage_trainer.recipe.address import names_shards
from stage_trainer.recipe.read import flatten
from stage_trainer.tasks import Task

_STAGE = Stage(steps=0, max_tokens=0, batch=BatchSizes(), lr=Rates(), data=StageData())
_LANES = "stage.data.lanes"
_DEFAULTS = Recipe(name="", output="", corpus="", model=ModelConfig(text={}, tokenizer=""), stages=(_STAGE,))


def starting_point(task: Task, state: RunState, tokenizer: Tokenizer) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """(model, optimizer state) of this stage's newest checkpoint, of the stage before, or new.

    Args:
        task: of the stage.
        state: gets what the checkpoint holds, and records which model the stage started from.

    Raises:
        UserError: the stage before is not finished, or this one was begun with other settings or data.
    """
    recipe, number = task.recipe, task.number
    saved = latest_valid(recipe.stage_directory(number))
    before = latest_valid(recipe.stage_directory(number - 1)) if number > 1 else None
    finished = before if before and before.step >= recipe.stage(number - 1).steps else None
    grown_from = f"the model of stage {number - 1}"
    if finished:
        state.data[grown_from] = finished.model_digest()
    if saved:
        former = saved.state()
        if _LANES not in former.get("settings", {}) and saved.step < recipe.stage(number).steps:
            raise UserError(
                f"{recipe.stage_directory(number)} was begun by a release that drew samples in another order (its "
                "settings have no 'data.lanes'); finish it with that release, name another output=…, or use "
                "--start-over, which moves the old run aside"
            )
        if not finished:  # it may be gone once the next stage has begun
            state.data |= {k: v for k, v in former.get("data", {}).items() if k == grown_from}
        # A setting that is newer than the release that started the run has its default.
        defaults = {k: v for k, v in settings(_DEFAULTS, 1).items() if k in state.settings}
        former["settings"] = {**defaults, **former.get("settings", {})}
        compatible(former, state, recipe.stage_directory(number))
        state.load_state_dict(former)
        return task.load_model(saved.model), saved.optimizer()
    if number == 1:
        return task.build_model(tokenizer), None
    if not finished:
        so_far = f"stopped at step {before.step} of {recipe.stage(number - 1).steps}" if before else "has not run"
        raise UserError(
            f"stage {number} starts from stage {number - 1}, which {so_far} ({recipe.stage_directory(number - 1)}); "
            f"run it first: bash launch/stage{number - 1}.sh"
        )
    carried = finished.optimizer() if task.stage.carry_optimizer else None
    return task.load_former_model(finished.model, tokenizer), carried


def settings(recipe: Recipe, number: int) -> dict[str, Any]:
    """What must not change between two runs of a stage: everything that affects its numbers."""
    everything = dataclasses.asdict(recipe)
    how = ("deepspeed", "gradient_cache", "embedding_cache")  # what they change is rounding
    stage = {k: v for k, v in everything["stages"][number - 1].items() if k not in how}
    tree = {k: v for k, v in everything.items() if k in ("model", "optimizer", "seed", "precision")}
    del stage["loss"]["exchange"]  # rounding, too
    # A folder may be moved, also to a URL; what is in it has a fingerprint of its own.
    del tree["model"]["tokenizer"]
    if stage["teacher"]:
        del stage["teacher"]["folder"]
        if stage["teacher"]["of"] == ("texts",):  # as of releases before there was this setting
            del stage["teacher"]["of"]
    stage["data"]["lanes"] = recipe.stage(number).data.lane_count
    for source in (*stage["data"]["image_text"], *stage["data"]["text"]):
        source["path"] = "/".join(source["path"].partition("?")[0].rstrip("/").split("/")[-2:])
        if not source["graded"]:  # as of releases before there was this setting
            del source["graded"]
        if not names_shards(source["path"]):  # these are for shards alone
            del source["shuffle_buffer"], source["caption_key"]
    return flatten({**tree, "stage": stage})


def move_aside(directory: Path) -> None:
    if directory.exists():
        aside = directory.rename(free_name(directory, "old"))
        print(f"the former run is now in {aside}", flush=True)
