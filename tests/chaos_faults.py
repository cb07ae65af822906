"""The faults of tests/chaos.py, and how the processes of a trial are started and watched.

Each fault begins a trial, disturbs it, and takes itself away; what the command owes then is `Chaos.finish`'s affair.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos_tasks import Task
from tests.integration.conftest import started
from tests.integration.test_stopping import alive

CLOCK = """
import os, time
shift, after = map(float, os.environ["CHAOS_CLOCK"].split())
now, now_ns, begun = time.time, time.time_ns, time.monotonic()
def late():
    return shift if time.monotonic() - begun >= after else 0.0
time.time = lambda: now() + late()
time.time_ns = lambda: now_ns() + int(late() * 1e9)
"""


class Lost(Exception):
    """Something that an undisturbed run has is missing, or differs."""


class Late(Exception):
    """There is nothing left to disturb."""


class Hung(Exception):
    """A process has not ended."""


def below(process: int) -> list[int]:
    """All living processes that a process started, and those that they started."""
    found = []
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()):
            found += [child] * alive(child) + below(child)
    return found


def command_of(process: int) -> str:
    with contextlib.suppress(OSError):
        comm, line = (Path(f"/proc/{process}/{name}").read_text().replace("\0", " ") for name in ("comm", "cmdline"))
        return f"{comm.strip()}: {line}"
    return "?"


class Mounts:
    """File systems in main memory that only the commands of one trial see. Needs root, or user namespaces."""

    def __init__(self) -> None:
        root = os.geteuid() == 0
        words = ["unshare", *([] if root else ["-U", "-r"]), "-m", "sleep", "infinity"]
        self.holder = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        while Path(f"/proc/{self.holder.pid}/comm").read_text() != "sleep\n":
            if self.holder.poll() is not None:
                raise OSError(self.holder.stderr.read().strip())  # type: ignore[union-attr]
            time.sleep(0.01)
        more = [] if root else ["-U", "--preserve-credentials"]
        self.enter = ["nsenter", "-t", str(self.holder.pid), "-m", *more]

    def mount(self, place: Path, options: str) -> None:
        """Mounts an empty file system, or changes the options of ours ("remount,size=…")."""
        words = [*self.enter, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()


@dataclass
class Trial:
    """One fault against one command: its folder, its processes, what was done."""

    task: Task
    folder: Path
    draw: random.Random
    patience: float
    lasted: float = 0.0  # the undisturbed run, in seconds
    size: int = 0  # of its result, in bytes
    excused: bool = False  # whether the input was at fault, so that samples may have been replaced
    what: list[str] = field(default_factory=list)
    mounts: Mounts | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """What the command sees as ./out."""
        root = f"/proc/{self.mounts.holder.pid}/root" if self.mounts else ""
        return Path(f"{root}{self.folder}/out")

    def begin(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.task.begin(self.folder, self.out)

    def start(self, *words: str, shell: str = "true") -> subprocess.Popen:
        enter = self.mounts.enter if self.mounts else []
        line = ["bash", "-c", f'cd "$0" && {shell} && exec "$@"', str(self.folder), *(words or self.task.words())]
        return started([*enter, *line], self.folder, **self.environment)

    def left(self) -> list[int]:
        """What was started and lives, but for the holder of the mounts."""
        return [pid for pid in below(os.getpid()) if not self.mounts or pid != self.mounts.holder.pid]

    def wait(self, process: subprocess.Popen) -> int:
        """The exit status, once the command and all that it started have ended."""
        end = time.monotonic() + (limit := max(self.patience, 5 * self.lasted))
        while process.poll() is None or self.left():
            if time.monotonic() > end:
                raise Hung(f"not ended after {limit:.0f} s: {', '.join(command_of(p)[:90] for p in self.left())}")
            time.sleep(0.05)
        return process.returncode

    def run(self, *words: str) -> int:
        return self.wait(self.start(*words))

    def moment(self, process: subprocess.Popen, least: float = 0.0) -> None:
        """Lets the command run up to a moment, a share of the undisturbed run's time; Late if it ends before."""
        share = self.draw.uniform(least, 0.9)
        end = time.monotonic() + share * self.lasted
        self.what.append(f"at {share:.2f}")
        while time.monotonic() < end:
            if process.poll() is not None:
                raise Late
            time.sleep(0.01)

    def killed(self, least: float = 0.0) -> None:
        """Runs the command to a moment, and ends it there."""
        process = self.start()
        self.moment(process, least)
        self.signal(process, signal.SIGKILL, "everything")
        self.wait(process)

    def signal(self, process: subprocess.Popen, number: int, whom: str) -> list[int]:
        """Signals the command, one of the processes below it, or all."""
        children = below(process.pid)
        if whom == "a child" and children:
            pids = [self.draw.choice(children)]
            whom += f" ({command_of(pids[0])[:40]})"
        else:
            pids = [process.pid, *(children if whom == "everything" else [])]
        self.what.append(f"{signal.Signals(number).name} to {whom}")
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        return pids

    def mount(self, place: Path, options: str) -> None:
        self.mounts = self.mounts or Mounts()
        place.mkdir(parents=True, exist_ok=True)
        self.mounts.mount(place, options)

    def unmount(self) -> None:
        """Goes on outside of the mounts, with what stands in them."""
        if self.mounts:
            if self.out.stat().st_dev != self.folder.stat().st_dev:
                shutil.copytree(self.out, self.folder / "out", symlinks=True, dirs_exist_ok=True)
            self.mounts.close()
            self.mounts = None

    def logs(self) -> list[str]:
        count = len(list(self.folder.glob("log-*")))
        return [(self.folder / f"log-{number}").read_text(errors="replace") for number in range(count)]

    def close(self) -> None:
        """Ends what is left."""
        while left := self.left():
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.unmount()
        with contextlib.suppress(ChildProcessError):  # orphans, which have become ours
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        self.task.end()


def kill(trial: Trial) -> None:
    """SIGKILL to the command, to a process below it, or to all; up to three times."""
    trial.begin()
    for kills in range(trial.draw.randint(1, 3)):
        process = trial.start()
        with contextlib.suppress(*[Late] * bool(kills)):  # after a kill there may be little left to do
            trial.moment(process)
        trial.signal(process, signal.SIGKILL, trial.draw.choice(("the command", "a child", "everything")))
        trial.wait(process)


def stop(trial: Trial) -> None:
    """SIGSTOP to all, or to a process below the command, for some seconds; for ever if the command watches it."""
    trial.begin()
    process = trial.start()
    trial.moment(process)
    pids = trial.signal(process, signal.SIGSTOP, trial.draw.choice(("a child", "everything")))
    if not trial.task.watches(pids):
        time.sleep(trial.draw.uniform(0.5, 6))
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
    trial.wait(process)


def disk(trial: Trial) -> None:
    """The disk of the results is full from the start or from a moment on; of bytes, or of files."""
    place, draw = trial.folder / "out", trial.draw
    trial.mount(place, "size=1g")
    trial.begin()
    if process := trial.start() if draw.random() < 0.5 else None:
        trial.moment(process)
    status, share = os.statvfs(trial.out), draw.random()
    used, files = (status.f_blocks - status.f_bfree) * status.f_frsize, status.f_files - status.f_ffree
    size = f"size={used + 4096 + int(share * trial.size * (0.3 if process else 1))}"
    limit = size if draw.random() < 0.8 else f"nr_inodes={files + int(share * 30)}"
    trial.what.append(f"{limit} of {trial.size}")
    with contextlib.suppress(OSError):  # what is there has grown meanwhile
        trial.mount(place, f"remount,{limit}")
    trial.wait(process or trial.start())
    trial.unmount()


def shm(trial: Trial) -> None:
    """A /dev/shm of a few kilobytes or megabytes."""
    size = trial.draw.choice(("4k", "64k", "256k", "1m", "4m"))
    trial.what.append(f"/dev/shm of {size}")
    trial.mount(Path("/dev/shm"), f"size={size}")
    trial.begin()
    trial.run()
    trial.unmount()


def descriptors(trial: Trial) -> None:
    """A low limit of open files."""
    trial.begin()
    trial.what.append(f"ulimit -n {trial.draw.randint(24, 96)}")
    trial.wait(trial.start(shell=trial.what[-1]))


def damage(trial: Trial) -> None:
    """After a kill, a file is not what was written, is cut off, empty or gone, or a folder has another name."""
    trial.begin()
    trial.killed(least=0.4)
    if not (targets := trial.task.damageable(trial.folder, trial.out)):
        raise Late
    target = trial.draw.choice(targets)
    how = "renamed" if target.is_dir() else trial.draw.choice(trial.task.damages)
    trial.what.append(f"{'/'.join(target.parts[-3:])} is {how}")
    if how == "renamed":
        other = target.rename(target.with_name("step-0000099"))
        return aftermath(trial, lambda: other.rename(target), trial.task.must_say(other))
    content = target.read_bytes()
    target.unlink()  # it may be a link to what all trials share
    if how != "gone":
        target.write_bytes(spoiled(content, how, trial.draw))

    def restore() -> None:
        target.unlink(missing_ok=True)
        target.write_bytes(content)

    aftermath(trial, restore, trial.task.must_say(target))


def spoiled(content: bytes, how: str, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) or 1)
    if how in ("cut off", "empty"):
        return content[: place * (how == "cut off")]
    end = place + (1 if how == "flipped" else 4096)
    changed = bytes(byte ^ 16 if how == "flipped" else 0 for byte in content[place:end])
    return content[:place] + changed + content[end:]


def swap(trial: Trial) -> None:
    """After a kill, two input shards have each other's name."""
    trial.begin()
    trial.killed()
    one, other = trial.draw.sample(trial.task.shards(trial.folder), 2)
    suffixes = trial.draw.choice(((".tar", ".index.npy"), (".tar",)))

    def exchange() -> None:
        for suffix in suffixes:
            a, b = one.with_suffix(suffix), other.with_suffix(suffix)
            between = a.rename(a.with_name("between"))
            b.rename(a)
            between.rename(b)

    exchange()
    trial.what.append(f"{one.parent.parent.name}/{one.stem} and {other.stem} swapped ({' '.join(suffixes)})")
    aftermath(trial, exchange)


def aftermath(trial: Trial, undo: Callable[[], Any], named: str = "") -> None:
    """Runs on; what is refused with a message is what the user can undo."""
    trial.excused, refused = True, trial.run()
    if named and named not in trial.logs()[-1]:
        raise Lost(f"nothing was said about {named}")
    if refused:
        trial.what.append("refused")
        undo()


def clock(trial: Trial) -> None:
    """The clock is set back or forward in a run and between runs, and files are dated so."""
    hook = trial.folder / "hook"
    hook.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(CLOCK)
    trial.begin()
    trial.environment["PYTHONPATH"] = str(hook)
    shifts = [trial.draw.choice((-1, 1)) * 10 ** trial.draw.uniform(0, 8) for _ in range(2)]
    trial.what.append("clock set by {:.0f} s, then {:.0f} s".format(*shifts))
    trial.environment["CHAOS_CLOCK"] = f"{shifts[0]} {trial.draw.uniform(0, trial.lasted)}"
    trial.killed(least=0.2)
    for path in trial.out.rglob("*"):
        os.utime(path, (time.time() + shifts[0],) * 2)
    trial.environment["CHAOS_CLOCK"] = f"{shifts[1]} 0"


def network(trial: Trial) -> None:
    """The server of the data, or of the captions, misbehaves for a while."""
    trial.begin()
    trial.what.append(trial.task.misbehave(trial.draw))
    trial.excused = True
    process = trial.start()
    end = time.monotonic() + trial.draw.uniform(0.5, 3) * trial.lasted
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    trial.task.behave()
    trial.wait(process)


FAULTS: dict[str, Callable[[Trial], None]] = {
    f.__name__: f for f in (kill, stop, disk, shm, descriptors, damage, swap, clock, network)
}
