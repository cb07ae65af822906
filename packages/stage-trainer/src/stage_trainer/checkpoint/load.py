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
from stage_trainer.files import read_json, sha256

DIGEST = "sha256"
BEST = "best.json"
_NAME = re.compile(r"step-(\d{7,})")
_MOVED = re.compile(r".*\.(damaged|other)-\d+")
"""What a run has moved aside, and said so."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk; `step` is what its folder's name says."""

    path: Path
    step: int

    @property
    def model(self) -> Path:
        return self.path / "model"

    def state(self) -> dict[str, Any]:
        """What state.json holds.

        Raises:
            UserError: it cannot be read, or is not what was written.
        """
        try:
            state = read_json(self.path / "state.json")
            if not isinstance(state.get("step"), int) or not isinstance(state.get("files"), dict):
                raise ValueError("it lacks 'step' or 'files'")
            if state.pop(DIGEST, None) not in (None, digest_of(state)):  # earlier releases wrote none
                raise ValueError("it is not what was written")
        except ValueError as error:
            raise UserError(
                f"{self.path} has no readable state.json ({error}); move that checkpoint away and start again"
            ) from error
        return state

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")

    def damage(self, part: str = "") -> str | None:
        """What differs from what was written, or None. Reads the whole checkpoint, or the files below `part`."""
        try:
            state = self.state()
            if state["step"] != self.step:
                right = path_of(self.path.parent, state["step"]).name
                return f"it is of step {state['step']}, so its folder was renamed; name it {right} again"
            written = state["files"]
            for name, digest in ((n, d) for n, d in written.items() if n.startswith(part)):
                if not (self.path / name).is_file():
                    return f"{name} is missing"
                if sha256(self.path / name) != digest:
                    return f"{name} is not what was written"
        except (UserError, OSError) as error:
            return str(error)
        return None

    def model_digest(self) -> str:
        """sha256 over the model's files, the same for the same weights and settings wherever the checkpoint stands."""
        files = {name: d for name, d in self.state()["files"].items() if name.startswith("model/")}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def digest_of(state: Mapping[str, Any]) -> str:
    """sha256 of what state.json holds, which stands beside it under `DIGEST`."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def at(path: Path) -> Saved:
    """The checkpoint in a folder of any name, such as a copy of one.

    Raises:
        UserError: its state.json cannot be read.
    """
    return Saved(path, Saved(path, 0).state()["step"])


def all_saved(directory: Path) -> list[Saved]:
    """The checkpoints of a stage, oldest first, damaged ones among them."""
    if not directory.is_dir():
        return []
    found = [(int(m[1]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [Saved(path, step) for step, path in sorted(found)]


def misnamed(directory: Path) -> list[str]:
    """What to say of each folder that looks like a checkpoint and has another name than one."""
    said = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        named = _NAME.fullmatch(path.name) or _MOVED.fullmatch(path.name) or path.name.startswith(".")
        if named or not path.is_dir() or not (path.name.startswith("step-") or (path / "state.json").exists()):
            continue
        try:
            remedy = f"it is of step {at(path).step}: name it {path_of(directory, at(path).step).name}, or move it away"
        except UserError:
            remedy = "it has no readable state.json: move it away"
        said.append(f"{path} looks like a checkpoint, but its name is not that of one; {remedy}")
    return said


def latest_valid(directory: Path) -> Saved | None:
    """The newest checkpoint of a stage that is as it was written. Every rank calls it; rank 0 reads, and machines that
    do not share its run folder get a copy.

    A damaged or renamed one is skipped with a message, and kept.

    Raises:
        UserError: there are checkpoints, and all are damaged or renamed.
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
        renamed = misnamed(directory)
        if found is None and damages:
            problem = UserError(f"{'; '.join(damages + renamed)}; move them away and start the stage again")
        elif found is None and renamed:
            problem = UserError(f"{'; '.join(renamed)}. There is no other checkpoint; --start-over starts again")
        for line in damages + renamed if found else ():
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
    """{"metric", "value", "step"} of a stage's best checkpoint; empty if there is none.

    Raises:
        UserError: best.json is damaged.
    """
    path = directory / BEST
    if not path.exists():
        return {}
    try:
        best = read_json(path)
        kinds: dict[str, type | tuple[type, ...]] = {"metric": str, "value": (int, float), "step": int}
        if wrong := [name for name, kind in kinds.items() if not isinstance(best.get(name), kind)]:
            raise ValueError(f"{wrong[0]} is {best.get(wrong[0])!r}")
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}), so which checkpoint is the best is not known; move it away"
        ) from error
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
        # Both as JSON has them: settings that an older run did not know are given as defaults, which may be tuples.
        before, after = (json.loads(json.dumps(each)) for each in (saved.get(part, {}), getattr(now, part)))
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
