"""Faults against training and data preparation, one after another, for as long as you like: is anything lost?

    python tests/chaos.py --minutes 60 --seed 0
    python tests/chaos.py --minutes 5 --faults kill,disk --against training
    python tests/chaos.py --seed 0 --only training/kill/17        # that one again

A trial runs a command of ours (`chaos_tasks.py`) in a folder of its own with a fault (`chaos_faults.py`), takes the
fault away and runs the same command again. What comes out has to be what an undisturbed run gives: weights, optimizer
and curves bit for bit, published shards byte for byte, every caption paid for once. A trial is

    survived    if that is so; after damage also if the ledger of replaced samples, or a checksum, says why it is not
    lost        if something else comes out, or if the command fails though the fault is gone
    hung        if the command, or a process that it started, has not ended after --patience seconds
    traceback   if a Python traceback was printed; it counts beside the others

and the exit status is 1 if any was not survived. The folder of such a trial stays, with what was printed in its log-N.
A trial is a function of seed, side, fault and number; its moments are shares of the undisturbed run's time, so that a
repetition meets nearly the same place.

What faults need: all need Linux's /proc. `disk` and `shm` mount small file systems in a mount namespace of their own:
by root, or in a user namespace where the system allows them. `clock` shifts Python's time.time alone: not the kernel's
clock, nor what C code reads. What cannot be injected on a machine is said at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests/support")]  # not tests/, where folders have the names of our packages

from tests.chaos_faults import FAULTS, Hung, Late, Lost, Mounts, Trial  # noqa: E402
from tests.chaos_tasks import SIDES, Task  # noqa: E402

OUTCOMES = ("survived", "lost", "hung", "traceback")
TRACEBACKS = ("Traceback (most recent call last)", "Fatal Python error", "terminate called after")


class Chaos:
    """The trials of one seed.

    Args:
        folder: for the trials' folders. patience: seconds after which a process that has not ended hangs.
    """

    def __init__(self, folder: Path, seed: int, patience: float):
        self.folder, self.seed, self.patience = folder, seed, patience
        self.shared = folder / "shared"
        self.shared.mkdir(parents=True)
        self.expected: dict[str, tuple[float, int, dict[str, Any]]] = {}
        self.tasks: dict[str, list[Task]] = {}
        # A process whose parent is gone becomes a child of this one (PR_SET_CHILD_SUBREAPER): none is missed.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)

    def try_one(self, side: str, fault: str, number: int) -> tuple[str, bool]:
        """Runs a trial and prints a line; returns its outcome, and whether there was a traceback."""
        draw = random.Random(f"{self.seed}/{side}/{fault}/{number}")
        if side not in self.tasks:
            self.tasks[side] = [make(self.shared) for make in SIDES[side]]
        task = draw.choice([task for task in self.tasks[side] if fault in task.faults])
        lasted, size, expected = self.undisturbed(task)
        name = f"{side}/{fault}/{number}"
        trial = Trial(task, self.folder / name.replace("/", "-"), draw, self.patience, lasted, size)
        began = time.monotonic()
        outcome, note = "survived", ""
        try:
            FAULTS[fault](trial)
            note = self.finish(trial, expected)
        except Hung as error:
            outcome, note = "hung", str(error)
        except Lost as error:
            outcome, note = "lost", str(error)
        except Late:
            outcome = "late"
        finally:
            trial.close()
        traceback = any(sign in log for log in trial.logs() for sign in TRACEBACKS)
        took = f"{time.monotonic() - began:.0f} s"
        print(
            f"{name}: {outcome}{traceback * ', traceback'} ({task.name}; {'; '.join(trial.what)}; {took}) {note}",
            flush=True,
        )
        if outcome in ("survived", "late") and not traceback:
            shutil.rmtree(trial.folder)
        else:
            print(f"    {trial.folder}\n    python tests/chaos.py --seed {self.seed} --only {name}", flush=True)
        return outcome, traceback

    def finish(self, trial: Trial, expected: dict[str, Any]) -> str:
        """Runs the command to its end and compares; returns what explains a difference.

        Raises:
            Lost, Hung
        """
        if code := trial.run():
            lines = [line for line in trial.logs()[-1].splitlines() if line.strip()]
            raise Lost(f"fails though the fault is gone, with {code}: {lines[-1] if lines else ''}")
        found = trial.task.result(trial.out, trial.run)
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        excuse = trial.task.excuse(trial.out) if different and trial.excused else ""
        if different and not excuse:
            raise Lost(f"another result in {', '.join(different[:5])}{' …' * (len(different) > 5)}")
        return excuse

    def undisturbed(self, task: Task) -> tuple[float, int, dict[str, Any]]:
        """The seconds, the bytes and the result of a task without a fault."""
        if task.name not in self.expected:
            folder = self.folder / f"undisturbed-{len(self.expected)}"
            trial = Trial(task, folder, random.Random(0), self.patience)
            trial.begin()
            began = time.monotonic()
            if trial.run():
                sys.exit(f"{task.name} fails without any fault; see {folder}\n{trial.logs()[-1][-2000:]}")
            lasted = time.monotonic() - began
            size = sum(path.stat().st_size for path in trial.out.rglob("*") if path.is_file())
            self.expected[task.name] = lasted, size, task.result(trial.out, trial.run)
            trial.close()
            print(f"undisturbed: {task.name}, {lasted:.0f} s", flush=True)
        return self.expected[task.name]


def trials(seed: int, sides: list[str], faults: list[str]) -> Iterator[tuple[str, str, int]]:
    """(side, fault, number) for ever: in each round every fault once against each side, in an order of its own."""
    number = 0
    while True:
        round_ = [(side, fault, number) for side in sides for fault in faults]
        random.Random(f"{seed}/{number}").shuffle(round_)
        yield from round_
        number += 1


def cannot(fault: str) -> str:
    """Why a fault cannot be injected on this machine; empty if it can."""
    if fault not in ("disk", "shm"):
        return ""
    try:
        mounts = Mounts()
    except OSError as error:
        return f"no mount namespace ({error}); needs root, or user namespaces"
    try:
        mounts.mount(Path("/dev/shm"), "size=4k")
    except OSError as error:
        return f"no tmpfs can be mounted ({error}); needs root, or user namespaces"
    finally:
        mounts.close()
    return ""


def chosen(text: str, known: list[str]) -> list[str]:
    names = text.split(",") if text else known
    if unknown := set(names) - set(known):
        sys.exit(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long to go on (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="", metavar="A,B", help=f"of {', '.join(FAULTS)} (default: all)")
    parser.add_argument("--against", default="", metavar="A,B", help=f"of {', '.join(SIDES)} (default: all)")
    parser.add_argument("--only", metavar="SIDE/FAULT/NUMBER", help="one trial")
    # A rank that stops before the ranks have met is waited for until the recipe's `limits.start`, 300 s, ends the run.
    parser.add_argument("--patience", type=float, default=400, metavar="SECONDS", help="default: 400")
    parser.add_argument("--folder", type=Path, help="an empty one for the trials (default: a new one in runs/chaos)")
    options = parser.parse_args()
    (ROOT / "runs/chaos").mkdir(parents=True, exist_ok=True)
    folder = options.folder or Path(tempfile.mkdtemp(prefix=f"seed-{options.seed}-", dir=ROOT / "runs/chaos"))
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background, a shell has the first ignored
        signal.signal(number, signal.default_int_handler)
    chaos = Chaos(folder.resolve(), options.seed, options.patience)
    if options.only:
        side, fault, number = options.only.split("/")
        outcome, traceback = chaos.try_one(side, fault, int(number))
        return int(outcome in OUTCOMES[1:] or traceback)
    faults = chosen(options.faults, list(FAULTS))
    reasons = {fault: reason for fault in faults if (reason := cannot(fault))}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    began = time.monotonic()
    try:
        for side, fault, number in trials(
            options.seed, chosen(options.against, list(SIDES)), [f for f in faults if f not in reasons]
        ):
            if time.monotonic() - began > 60 * options.minutes:
                break
            outcome, traceback = chaos.try_one(side, fault, number)
            if outcome != "late" or traceback:
                counts[fault].update(["injected", outcome, *["traceback"] * traceback])
    except KeyboardInterrupt:
        print("stopped")
    return summary(counts, reasons, (time.monotonic() - began) / 60)


def summary(counts: dict[str, Counter[str]], reasons: dict[str, str], minutes: float) -> int:
    """Prints the table; returns the exit status."""
    columns = ("injected", *OUTCOMES)
    total = sum(counts.values(), Counter[str]())
    print(f"\n{minutes:.0f} minutes\n{'':<14}" + "".join(f"{column:>11}" for column in columns))
    for name, count in [*counts.items(), ("all", total)]:
        print(f"{name:<14}" + "".join(f"{count[column]:>11}" for column in columns))
    for fault, reason in reasons.items():
        print(f"{fault} could not be injected on this machine: {reason}")
    return int(any(total[outcome] for outcome in OUTCOMES[1:]))


if __name__ == "__main__":
    sys.exit(main())
