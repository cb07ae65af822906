"""Finding, verifying and reading checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stage_trainer.checkpoint.broadcast import copy_to_other_machines, from_rank_0
from stage_trainer.checkpoint.state import RunState
from stage_trainer.errors import UserError

BEST = "best.json"
_NAME = re.compile(r"step-(\d{7})")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    path: Path
    step: int

    @property
    def model(self) -> Path:
        return self.path / "model"

    def state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.path / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} has no readable state.json ({error}); move that checkpoint away and start again"
            ) from error
        return state

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")

    def damage(self, part: str = "") -> str | None:
        """What differs from what was written, or None. Reads the whole checkpoint, or the files below `part`."""
        try:
            written = self.state()["files"]
            for name, digest in ((n, d) for n, d in written.items() if n.startswith(part)):
                if not (self.path / name).is_file():
                    return f"{name} is missing"
                if sha256(self.path / name) != digest:
                    return f"{name} is not what was written"
        except (UserError, OSError, KeyError) as error:
            return str(error)
        return None

    def model_digest(self) -> str:
        """sha256 over the model's files, the same for the same weights and settings wherever the checkpoint stands."""
        files = {name: d for name, d in self.state()["files"].items() if name.startswith("model/")}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def all_saved(directory: Path) -> list[Saved]:
    """The checkpoints of a stage, oldest first."""
    if not directory.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / "state.json").exists()
    ]
    return [Saved(path, step) for step, path in sorted(found)]


def latest_valid(directory: Path) -> Saved | None:
    """The newest checkpoint of a stage that is as it was written. Every rank calls it; rank 0 reads, and machines that
    do not share its run folder get a copy.

    A damaged one is skipped with a message, and kept.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found: Saved | None = None
    problem: UserError | None = None
    if torch.distributed.get_rank() == 0:
        damages = []
        for saved in reversed(all_saved(directory)):
            if (damage := saved.damage()) is None:
                found = saved
                break
            damages.append(f"the checkpoint {saved.path} is damaged: {damage}")
        if damages and found is None:
            problem = UserError(f"{'; '.join(damages)}; move them away and start the stage again")
        for line in damages if found else ():
            print(f"{line}; going on from step {found.step} instead", flush=True)  # type: ignore[union-attr]
        if damages and found:
            print(
                "(damaged checkpoints are kept and can be deleted; when the run reaches the step of one again, it is "
                "renamed to end in .damaged-1)",
                flush=True,
            )
    found, problem = from_rank_0((found, problem))
    if problem is not None:
        raise problem
    if found is not None:
        copy_to_other_machines(found.path)
    return found


def path_of(directory: Path, step: int) -> Path:
    """The path of a stage's checkpoint at a step."""
    return directory / f"step-{step:07d}"


def read_best(directory: Path) -> dict[str, Any]:
    """{"metric", "value", "step"} of a stage's best checkpoint; empty if there is none."""
    try:
        best: dict[str, Any] = json.loads((directory / BEST).read_text())
    except (OSError, ValueError):
        return {}
    return best


def compatible(saved: Mapping[str, Any], now: RunState, where: Path) -> None:
    """Refuses to go on with other settings or data than a run was started with.

    Args:
        saved: what state.json holds.

    Raises:
        UserError: names every difference.
    """
    differences = []
    for part in ("settings", "data"):
        before, after = saved.get(part, {}), json.loads(json.dumps(getattr(now, part)))
        differences += [
            f"{name} was {before.get(name, 'absent')!r} and is now {after.get(name, 'absent')!r}"
            for name in sorted(set(before) | set(after))
            if before.get(name) != after.get(name)
        ]
    if differences:
        raise UserError(
            f"{where} was started with other settings or data: {'; '.join(differences)}. Use the former "
            "settings, another output=…, or --start-over, which moves the old run aside"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
