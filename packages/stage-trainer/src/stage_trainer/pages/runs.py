"""What a run's folder tells: its stages' checkpoints, figures, curves and ledgers, and what it lacks."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stage_trainer.checkpoint.load import Saved, all_saved
from stage_trainer.data.drawn import LEDGER
from stage_trainer.errors import UserError
from stage_trainer.evaluation.report import EVALUATION, read_figures
from stage_trainer.evaluation.tables import Pools
from stage_trainer.formats.history import TrainedStage
from stage_trainer.recipe.kinds import kind_of

_SHOWN = ("loss/", "temperature/", "bias/", "speed/", "validation_", "modality_gap/", "trouble/")
"""What of the scalars is read, by prefix."""


@dataclass(frozen=True)
class Curve:
    """A scalar of a stage: its steps `[N]`, counted from the stage's start, and values `[N]`."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The values that can be drawn."""
        found: np.ndarray = self.values[np.isfinite(self.values)]
        return found


@dataclass(frozen=True)
class StageFolder:
    """A stage of a run.

    Attributes:
        directory: its folder, `RUN/stageN`.
        trained: its name and what its newest checkpoint's state.json holds; that is empty if there is none.
        saved: the newest checkpoint.
        pools: what `stage-trainer evaluate` found; empty if it was not evaluated.
        curves: TensorBoard's scalars by name.
        corrupt: the ledger's entries.
    """

    directory: Path
    trained: TrainedStage
    saved: Saved | None
    pools: Pools
    curves: Mapping[str, Curve]
    corrupt: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def both_towers(self) -> bool:
        """Whether its model has both towers, so that there are images to search."""
        return kind_of(lambda name: self.trained.setting(f"stage.batch.{name}")).both_towers

    @property
    def steps(self) -> int:
        """Steps done, as far as checkpoints and curves tell."""
        last = [int(curve.steps[-1]) + 1 for curve in self.curves.values() if len(curve.steps)]
        return max([int(self.trained.state.get("step", 0)), *last])


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes:
        name: unique among the runs that are shown together.
        lacks: what is missing or cannot be read, each with what to do about it.
    """

    name: str
    directory: Path
    stages: Sequence[StageFolder]
    lacks: Sequence[str]

    @property
    def evaluated(self) -> list[StageFolder]:
        return [stage for stage in self.stages if stage.pools]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each `RUN` with `stage1`, `stage2`, …, or one stage's.

    Raises:
        UserError: a folder is none, or holds no stage; two of them are the same.
    """
    if len({path.resolve() for path in directories}) < len(directories):
        raise UserError(f"a run is named twice: {', '.join(map(str, directories))}; name each once")
    return [_read(path, name) for path, name in zip(directories, _names(directories), strict=True)]


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    whole = [path.resolve().parts for path in directories]
    for length in range(1, max(map(len, whole))):
        names = [_printable("/".join(parts[-length:])) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {_printable(str(path.resolve()))}" for number, path in enumerate(directories, 1)]


def _printable(name: str) -> str:
    """A folder's name may have anything in it; a page and its charts are UTF-8 without control characters."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


def _read(directory: Path, name: str) -> Run:
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}; expected a run, as a recipe's `output` names it")
    numbered = {int(m[1]): p for p in directory.glob("stage*") if (m := re.fullmatch(r"stage(\d{1,4})", p.name))}
    folders = [numbered[number] for number in sorted(numbered)]
    if not folders and _has_stage(directory):
        folders = [directory]
    lacks: list[str] = []
    stages = [_stage(folder, lacks) for folder in folders if _has_stage(folder)]
    if not stages:
        raise UserError(
            f"{directory} holds no run: expected stage1, stage2, … with checkpoints or TensorBoard's files, as "
            "`stage-trainer train` writes them"
        )
    return Run(name, directory, stages, lacks)


def _has_stage(directory: Path) -> bool:
    return bool(all_saved(directory)) or any(directory.glob("*tfevents*"))


def _stage(directory: Path, lacks: list[str]) -> StageFolder:
    saved, state = all_saved(directory), {}
    if saved:
        try:
            state = saved[-1].state()
        except UserError as error:
            lacks.append(str(error))
    else:
        lacks.append(f"{directory} has no checkpoint yet, so its settings, versions and counts are not known")
    found = StageFolder(
        directory,
        TrainedStage(directory.name, state),
        saved[-1] if saved and state else None,
        _pools(directory, lacks),
        _curves(directory),
        _ledger(directory / LEDGER, lacks),
    )
    if not found.curves:
        lacks.append(f"{directory} has no TensorBoard files, so no curves of it are shown")
    _check_evaluation(found, lacks)
    return found


def _pools(directory: Path, lacks: list[str]) -> Pools:
    path = directory / EVALUATION
    if not path.exists():
        return {}
    try:
        return read_figures(path)
    except UserError as error:
        lacks.append(str(error))
        return {}


def _check_evaluation(stage: StageFolder, lacks: list[str]) -> None:
    """Names a stage that was not evaluated, or trained on after that."""
    if stage.saved is None or not stage.both_towers:
        return
    if not (stage.directory / EVALUATION).exists():
        command = shlex.join(["stage-trainer", "evaluate", str(stage.directory)])
        lacks.append(f"{stage.name} has not been evaluated: {command} CORPUS")
    of = {str(pool["checkpoint"]) for pool in stage.pools.values() if "checkpoint" in pool}
    if of - {stage.saved.path.name}:
        lacks.append(
            f"{stage.name} was trained on to {stage.saved.path.name} after {', '.join(sorted(of))} was evaluated: the "
            "figures are the older model's"
        )


def _curves(directory: Path) -> dict[str, Curve]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1}  # 0: all of them
    events = EventAccumulator(str(directory), size_guidance=sizes)
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(_SHOWN):
            entries = events.Scalars(tag)
            steps = np.array([entry.step for entry in entries])
            found[tag] = Curve(steps, np.array([entry.value for entry in entries], dtype=np.float64))
    return found


def _ledger(path: Path, lacks: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    entries, unreadable = [], 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        lacks.append(f"{path} cannot be read ({error.strerror or error})")
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            unreadable += 1
    if unreadable:
        lacks.append(f"{path}: {unreadable:,} of its lines cannot be read")
    return entries
