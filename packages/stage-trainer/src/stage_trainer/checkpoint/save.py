"""Writing checkpoints while training goes on: a step waits for a copy in main memory, not for the disk."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from stage_trainer.checkpoint.broadcast import from_rank_0
from stage_trainer.checkpoint.load import BEST, DIGEST, Saved, all_saved, digest_of, path_of, read_best
from stage_trainer.checkpoint.state import Best, RunState
from stage_trainer.engine import Engine
from stage_trainer.errors import UserError
from stage_trainer.files import free_name, save_tensors, sha256, whole_directory, write_whole


class Saveable(Protocol):
    """A model that a checkpoint can hold."""

    def load_state_dict(self, state_dict: dict[str, Tensor], *, assign: bool) -> object: ...

    def to_empty(self, *, device: str) -> object: ...

    def save_pretrained(self, path: Path) -> None: ...


class Saver:
    """Saves a stage's checkpoints, one at a time, and drops all but the newest and the best.

    Every rank calls everything but `failed`; rank 0 writes. Leaving `with` waits for what is being written.

    Args:
        directory: of the stage.
        keep: how many of the newest are kept.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep
        self.rank = torch.distributed.get_rank()
        self._thread: threading.Thread | None = None
        self._problem: UserError | None = None

    @property
    def failed(self) -> bool:
        """Whether this process could not write; `finish` says why, on all ranks."""
        return self._problem is not None

    def save(self, engine: Engine, state: RunState, best: Best | None = None) -> None:
        """Copies the model, the optimizer's state and the run's, and returns while they are written.

        Args:
            engine, state: what to save, after `state.step` steps.
            best: what makes this checkpoint the best so far; it stays until one is better.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        self.finish()
        optimizer: dict[str, Tensor] = {}
        for name, value in engine.optimizer_state():  # under ZeRO every rank has to take part in gathering
            if self.rank == 0:
                optimizer[name] = value.detach().to("cpu", copy=True).contiguous()
        weights = engine.copy_of_weights()
        if self.rank == 0:
            arguments = (cast(Saveable, engine.shell), weights, optimizer, state.state_dict(), best)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()

    def note_best(self, step: int, best: Best) -> None:
        """Records that the checkpoint of `step` is the best; it stays until one is better."""
        if self.rank == 0:
            write_whole(self.directory / BEST, json.dumps({**best, "step": step}) + "\n")

    def note_measured(self, step: int, state: RunState) -> None:
        """Records in the checkpoint of `step`, from which the run goes on, that the evaluation due there is done."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # machines may have folders of their own
            saved = Saved(path_of(self.directory, step), step)
            now = {**saved.state(), "best": state.best, "unmeasured": state.unmeasured}
            write_whole(saved.path / "state.json", _signed(now))

    def finish(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            UserError: it could not be written; earlier checkpoints are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = from_rank_0(self._problem), None
        if problem is not None:
            raise problem

    def _write(
        self,
        model: Saveable,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        best: Best | None,
    ) -> None:
        step = state["step"]
        try:
            model.load_state_dict(weights, assign=True)
            write(self.directory, model, optimizer, state)
            if best:
                self.note_best(step, best)
            self._drop_old(step)
        except UserError as error:
            self._problem = error
        except Exception as error:  # it would be lost with the thread
            self._problem = UserError(
                f"could not write a checkpoint to {self.directory}: {type(error).__name__}: {error}"
            )
        finally:
            model.to_empty(device="meta")  # the copy's memory is free until the next one

    def _drop_old(self, step: int) -> None:
        """Removes all up to `step` but the newest and the best. What is not a checkpoint that could be resumed counts
        for none, and stays."""
        try:
            kept = {read_best(self.directory).get("step")}
        except UserError as error:  # the best one must not be lost by it
            print(f"{error}; until then no checkpoint is removed", flush=True)
            return
        whole = [s for s in all_saved(self.directory) if s.step <= step and s.damage("state.json") is None]
        for old in whole[: -self.keep]:
            if old.step not in kept:
                shutil.rmtree(old.path)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:  # another rank may be gone: no collective call
            self._thread.join()


def write(directory: Path, model: Saveable, optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint of a stage, whole or not at all.

    Args:
        state: `RunState.state_dict()`.

    Raises:
        UserError: the disk is full.
    """
    step = state["step"]
    target = path_of(directory, step)
    if target.exists():  # damaged, else it would have been resumed; another run's, if there are no locks
        target.rename(free_name(target, "damaged" if Saved(target, step).damage() else "other"))
    with whole_directory(target) as path:
        save_tensors(optimizer, path / "optimizer.safetensors")
        model.save_pretrained(path / "model")
        files = {p.relative_to(path).as_posix(): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
        (path / "state.json").write_text(_signed({**state, "files": files}))


def _signed(state: dict[str, Any]) -> str:
    """The content of state.json."""
    whole = json.loads(json.dumps(state))  # as it is read back
    return json.dumps({**whole, DIGEST: digest_of(whole)}, indent=2) + "\n"
