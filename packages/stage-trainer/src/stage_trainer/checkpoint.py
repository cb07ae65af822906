"""Checkpoints: `step-NNNNNNN/{model/, optimizer.safetensors, state.json}`, whole or absent.

`model/` is a `DualEncoder` directory, so a checkpoint can be evaluated and taken out as it is. Optimizer state
stands by parameter name. state.json holds the step, the recipe's settings and the data's fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vision_tower import resample_position_table

from stage_trainer.engine import Engine
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.model import DualEncoder

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
            return json.loads((self.path / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} has no readable state.json ({error}); move that checkpoint away and start again"
            ) from error

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")

    def model_digest(self) -> str:
        """sha256 over the model's files, the same for the same weights and settings wherever the checkpoint stands."""
        digest = hashlib.sha256()
        for path in sorted(p for p in self.model.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(self.model).as_posix()}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def all_saved(directory: Path) -> list[Saved]:
    """The checkpoints of a stage, oldest first."""
    if not directory.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / "state.json").exists()
    ]
    return [Saved(path, step) for step, path in sorted(found)]


def save(directory: Path, step: int, engine: Engine, state: dict[str, Any], keep: int, rank: int) -> None:
    """Writes the checkpoint of `step`; all ranks call it, rank 0 writes. Then drops all but the newest `keep`."""
    target = directory / f"step-{step:07d}"
    optimizer = {}
    for name, value in engine.optimizer_state():  # under ZeRO every rank has to take part in gathering
        if rank == 0:
            optimizer[name] = value.detach().cpu().clone().contiguous()
    problem = None
    with engine.whole_model():
        if rank == 0:
            try:
                _write(target, engine.objective.model, optimizer, {**state, "step": step})
            except UserError as error:
                problem = error
    if torch.distributed.get_world_size() > 1:
        # A rank that cannot write must not leave the others waiting for it.
        outcome = [problem]
        torch.distributed.broadcast_object_list(outcome, src=0)
        problem = outcome[0]
    if problem is not None:
        raise problem
    if rank == 0:
        for old in all_saved(directory)[:-keep]:
            shutil.rmtree(old.path)


def _write(target: Path, model: DualEncoder, optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
    with whole_directory(target) as path:
        save_file(optimizer, path / "optimizer.safetensors")
        (path / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        model.save_pretrained(path / "model")


def set_resolution(model: DualEncoder, pixels: int, optimizer: dict[str, Tensor] | None = None) -> None:
    """Changes the vision tower's resolution and resamples the moments of its position table with it.

    The second moment is resampled bilinearly: bicubic weights can be negative, and a negative one becomes NaN.
    """
    old = model.vision.config.grid
    model.vision.set_resolution(pixels)
    for name in list(optimizer or {}):
        assert optimizer is not None
        owner, _, key = name.rpartition("|")
        if owner == "vision.pos_embed" and key != "step" and model.vision.config.grid != old:
            mode = "bilinear" if key == "exp_avg_sq" else "bicubic"
            optimizer[name] = resample_position_table(optimizer[name], old, model.vision.config.grid, mode=mode)


def compatible(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuses to go on with other settings or data than a run was started with.

    Raises:
        UserError: names every difference.
    """
    differences = []
    for part in ("settings", "data"):
        before, after = saved.get(part, {}), json.loads(json.dumps(now[part]))
        differences += [
            f"{name} was {before.get(name, 'absent')!r} and is now {after.get(name, 'absent')!r}"
            for name in sorted(set(before) | set(after))
            if before.get(name) != after.get(name)
        ]
    if differences:
        raise UserError(
            f"{where} was started otherwise: {'; '.join(differences)}. Use the former settings, another output=…, or "
            "--start-over, which moves the old run aside"
        )
