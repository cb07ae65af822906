"""Writes checkpoints while training goes on: a step waits for a copy in main memory, not for the disk."""

from __future__ import annotations

import difflib
import json
import math
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from stage_trainer.build import Model
from stage_trainer.engine import Engine
from stage_trainer.errors import UserError
from stage_trainer.files import write_whole
from stage_trainer.metrics.measure import Measure
from stage_trainer.run import checkpoint
from stage_trainer.run.rank_0 import from_rank_0


class Saver:
    """Saves a stage's checkpoints, one at a time, and drops all but the newest and the best.

    Every rank calls everything but `failed`; rank 0 writes. Leaving `with` waits for what is being written.

    Args:
        directory: of the stage.
        keep: so many of the newest stay.
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

    def save(self, step: int, engine: Engine, state: dict[str, Any], best: dict[str, Any] | None = None) -> None:
        """Copies the model and the optimizer's state of `step`, and returns while they are written.

        Args:
            step: steps done.
            engine, state: what to save.
            best: what makes this checkpoint the best so far ({"metric", "value"}); it stays until one is better.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        self.finish()
        optimizer = {}
        for name, value in engine.optimizer_state():  # under ZeRO every rank has to take part in gathering
            if self.rank == 0:
                optimizer[name] = value.detach().to("cpu", copy=True).contiguous()
        weights = engine.copy_of_weights()
        if self.rank == 0:
            arguments = (step, engine.shell, weights, optimizer, {**state, "step": step}, best)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()

    def note_best(self, step: int, best: dict[str, Any]) -> None:
        """Enters that the checkpoint of `step` is the best; it stays until one is better."""
        if self.rank == 0:
            write_whole(self.directory / checkpoint.BEST, json.dumps({**best, "step": step}) + "\n")

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
        self, step: int, model: Model, weights: Any, optimizer: Any, state: dict[str, Any], best: dict[str, Any] | None
    ) -> None:
        try:
            model.load_state_dict(weights, assign=True)
            checkpoint.write(self.directory, step, model, optimizer, state)
            if best:
                self.note_best(step, best)
            kept = {checkpoint.read_best(self.directory).get("step")}
            for old in [s for s in checkpoint.all_saved(self.directory) if s.step <= step][: -self.keep]:
                if old.step not in kept:
                    shutil.rmtree(old.path)
        except UserError as error:
            self._problem = error
        except Exception as error:  # in a thread, nobody else would hear of it
            self._problem = UserError(
                f"could not write a checkpoint to {self.directory}: {type(error).__name__}: {error}"
            )
        finally:
            model.to_empty(device="meta")  # the copy's memory is free until the next one

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:  # another rank may be gone, so this one asks nobody
            self._thread.join()


def check_best(metric: str | None, measures: Mapping[str, Measure] | None) -> None:
    """Finds before the first step whether `checkpoint.best` names something that will be measured.

    Raises:
        UserError: it does not; the message has the nearest names that do.
    """
    if metric is None or (measures and metric in measures):
        return
    near = difflib.get_close_matches(metric, measures or (), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"what is: {', '.join(sorted(measures or ()))}"
    raise UserError(
        f"checkpoint.best is {metric!r}, which nothing measures; "
        + (hint if measures else "there are no held-out data for this stage, so leave it out")
    )


def better(
    values: Mapping[str, float], measures: Mapping[str, Measure], metric: str | None, state: dict[str, Any]
) -> dict[str, Any] | None:
    """What makes this the best model so far by `metric`, entered in `state`; or None.

    Args:
        values, measures: what was measured, and what it means, by name.
        metric: the name that counts; None: nothing does.
        state: its "best" is the best so far ({"metric", "value"}), or None.
    """
    if metric is None:
        return None
    value, former = values[metric], state["best"]
    if not math.isfinite(value):
        return None
    if former and former["metric"] == metric:  # of another name, it is of an earlier recipe and tells nothing
        gain = value - former["value"]
        if (gain if measures[metric].higher_is_better else -gain) <= 0:
            return None
    state["best"] = {"metric": metric, "value": value}
    return state["best"]
