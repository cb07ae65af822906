"""Real training on the drawn corpus, one rank under NCCL (gloo on a CPU), ZeRO 0 and 1: steps, checkpoint, resume.

A run that goes on from its checkpoint ends with the same bits as one that was not interrupted. One step, after the
first ones, is watched: where the host waits for the device, and where the optimizer's state is. Each run has a process
of its own, as for users: DeepSpeed keeps the process group of a process's first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import drawn
import torch
from report import NEEDS_CUDA, Report, run_part
from stage_trainer.checkpoint.load import Saved, all_saved
from stage_trainer.recipe import Recipe
from stage_trainer.trainer import Trainer, train

STEPS, SAVED, WATCHED = 6, 3, 2
OURS = str(Path(__file__).parents[2] / "packages")


def measure(report: Report) -> None:
    drawn.recipe_of("", report.cuda)  # draws the corpus, before both need it
    with ThreadPoolExecutor() as pool:
        runs = {zero: pool.submit(under_zero, zero, report.cuda) for zero in (0, 1)}
    for zero, run in runs.items():
        report.tried(f"ZeRO {zero}", functools.partial(judge, report, zero, run))
    built = sorted(path.name for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("**/*.so"))
    report.note("compiled by DeepSpeed", built)
    report.check(not built, f"DeepSpeed compiled {built}")


def judge(report: Report, zero: int, run: Future[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    watched, resume = run.result()
    report.note(f"zero {zero}: one step", watched)
    report.note(f"zero {zero}: resume", resume)
    astray = {place for place in watched["optimizer_state"] if not place.startswith(report.device.type)}
    report.check(not astray, f"ZeRO {zero}: optimizer state is on {sorted(astray)}, not on the device")
    differing = resume["differing"]
    report.check(not differing, f"ZeRO {zero}: a resume from step {SAVED} ends with another {differing[:3]}")


def under_zero(zero: int, cuda: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was watched, and whether the last checkpoint is the same after a resume from the one before."""
    watched = trained(zero, cuda)
    directory = recipe_of(zero, cuda).stage_directory(1)
    before, last = all_saved(directory)
    undisturbed = digests(last)
    shutil.rmtree(last.path)
    trained(zero, cuda)
    again = digests(all_saved(directory)[-1])
    differing = sorted(name for name in undisturbed | again if undisturbed.get(name) != again.get(name))
    return watched, {
        "from_step": before.step, "to_step": last.step, "same_bits": not differing, "differing": differing,
        "files": len(undisturbed),
    }  # fmt: skip


def trained(zero: int, cuda: bool) -> dict[str, Any]:
    """What was watched in a run to the end, in a process of its own."""
    command = [sys.executable, __file__, "--train", str(zero), *([] if cuda else ["--cpu"])]
    run = subprocess.run(command, capture_output=True, text=True)
    print(run.stdout, run.stderr, flush=True)
    if run.returncode:
        raise RuntimeError(f"training under ZeRO {zero} ended with {run.returncode}: {run.stderr[-800:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def train_once(zero: int, cuda: bool) -> None:
    """Prints what was watched as the last line."""
    watched: dict[str, Any] = {}
    with watch(watched, cuda):
        train(recipe_of(zero, cuda), 1)
    print(json.dumps(watched))


def recipe_of(zero: int, cuda: bool) -> Recipe:
    return drawn.recipe_of(
        f"zero-{zero}", cuda, f"steps={STEPS}", "resolution=[[0, 32]]", "warmup_steps=2", "log_every=1",
        "workers=2", "evaluation.every=0", f"checkpoint={{every: {SAVED}, keep: 2}}",
        f"deepspeed={{zero_optimization: {{stage: {zero}}}}}",
    )  # fmt: skip


def digests(saved: Saved) -> dict[str, str]:
    """Of the files with weights and optimizer state."""
    return {name: digest for name, digest in saved.state()["files"].items() if name.endswith(".safetensors")}


@contextlib.contextmanager
def watch(found: dict[str, Any], cuda: bool) -> Iterator[None]:
    """Fills `found` with what step `WATCHED` does."""
    original = Trainer.train_step

    @functools.wraps(original)
    def train_step(self: Trainer, number: int, data: Any) -> Any:
        if number != WATCHED:
            return original(self, number, data)
        with waits(found, cuda):
            step = original(self, number, data)
        states = self.engine.optimizer.state.values()
        places = Counter(f"{t.device.type} {key}" for state in states for key, t in state.items() if torch.is_tensor(t))
        found.update(backend=torch.distributed.get_backend(), optimizer_state=dict(places))
        found["losses"] = {name: float(loss.detach()) for name, (loss, _) in step.losses.items()}
        return step

    with mock.patch.object(Trainer, "train_step", train_step):
        yield


@contextlib.contextmanager
def waits(found: dict[str, Any], cuda: bool) -> Iterator[None]:
    """Lists where the host waits for the device, by the line of ours that leads there."""
    if not cuda:
        found["synchronisations"] = NEEDS_CUDA
        yield
        return
    callers: Counter[str] = Counter()

    def heard(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if OURS in f.filename]
            callers[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with mock.patch.object(warnings, "showwarning", heard):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
    found["synchronisations"] = {"count": sum(callers.values()), "by_caller": dict(callers.most_common())}


if __name__ == "__main__":
    if sys.argv[1] == "--train":
        train_once(int(sys.argv[2]), cuda="--cpu" not in sys.argv)
    else:
        run_part(measure)
