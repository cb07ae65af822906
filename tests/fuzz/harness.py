"""Calls entry points that read foreign data in a child process, under limits, and says how each call ended.

A call may return, or raise the house's own named error. Anything else is a failure: another exception, more processor
time or memory than the kind of input allows, or what `guard` forbids.
"""

from __future__ import annotations

import contextlib
import dis
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fuzz.guard import Forbidden, Guard
from hypothesis.strategies import SearchStrategy

PACKAGES = ("stage_trainer", "data_prep", "text_tower", "vision_tower", "contrastive_losses")
MIB = 2**20
WALL = 180  # seconds after which the child is killed: a call that sleeps uses no processor time
WARM = 1200  # the same for imports and valid input, on a busy machine

Files = dict[str, bytes]
"""A case: what lies in the folder that an entry point is given, by name."""


@dataclass(frozen=True)
class Kind:
    """A kind of foreign input.

    name: for --only and the corpus. call: what reads the folder that holds a case; it may write into its parent. valid:
    cases that must be accepted. cases: hostile ones. seconds: of processor time; megabytes: of main memory beyond what
    the process had before the call.
    """

    name: str
    call: Callable[[Path], object]
    valid: Callable[[], list[Files]]
    cases: Callable[[], SearchStrategy[Files]]
    seconds: float = 10.0
    megabytes: int = 256


@dataclass(frozen=True)
class Verdict:
    """How a call ended. outcome: "accepted", "refused" or "failed"; what: the error, one line for each distinct fault;
    shown: the traceback, or the message."""

    outcome: str
    what: str = ""
    shown: str = ""


class Refusal(ValueError):
    """A command ended with a message and an exit status other than 0."""


class Broken(Exception):
    """What a call did is wrong, though it ended well: what, and how it shows."""


def command(main: Callable[[list[str]], int], *arguments: object) -> None:
    """Run a command in this process. Refusal if its exit status is not 0, Broken if its output steers a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")  # as Python's own
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
        out.flush()
        err.flush()
    printed = (out.buffer.getvalue() + err.buffer.getvalue()).decode()  # type: ignore[attr-defined]
    steering = sorted({sign for sign in printed if (sign < " " and sign not in "\n\t\r") or "\x7f" <= sign < "\xa0"})
    if steering:
        raise Broken(f"{arguments[0]} prints control characters", f"{steering} in {printed[:500]!r}")
    if status:
        raise Refusal(printed)


def all_of(*steps: Callable[[], object]) -> None:
    """Take every step, also after one that is refused, and raise the first refusal at the end."""
    refused: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            if not _is_named(error):
                raise
            refused.append(error.with_traceback(None))  # whose frames would hold what was read
            error.__cause__ = error.__context__ = None
    if refused:
        raise refused[0]


class Child:
    """A process that makes the calls, one after the other; it is started again after it had to be killed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")  # its memory is its own, not a copy of pytest's
        self._process: Any = None
        self._connection: Connection

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._connection.close()  # it ends when it has nothing more to read
            self._process.join(10)
        self._end()

    def call(self, kind: str, files: Files) -> Verdict:
        """Make one call."""
        if self._process is None:
            self._start()
        self._connection.send((kind, files))
        try:
            for limit in (WARM, WALL):  # it says when it begins, and when it is done
                if not self._connection.poll(limit):
                    self._end()
                    return Verdict("failed", "time: no end", f"killed after {limit} s")
                verdict: Verdict = self._connection.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            self._end()
            return Verdict("failed", f"the process died ({status})", f"exit status {status}")
        if verdict.what.startswith(("memory", "time")):  # its peak would hide the next one's
            self._end()
        return verdict

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def _end(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(connection: Connection) -> None:
    from fuzz.kinds import KINDS

    sys.dont_write_bytecode = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # a folder that names a repository must not be looked up
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    guard = Guard()
    sys.addaudithook(guard.audit)
    signal.signal(signal.SIGPROF, _too_long)
    warm: set[str] = set()
    with tempfile.TemporaryDirectory() as work:
        while True:
            try:
                name, files = connection.recv()
            except EOFError:
                return
            kind = KINDS[name]
            if name not in warm:  # imports and caches count for no case
                warm.add(name)
                for valid in kind.valid():
                    _one(kind, valid, Path(work), guard, limited=False)
            connection.send(None)
            connection.send(_one(kind, files, Path(work), guard, limited=True))


def _one(kind: Kind, files: Files, work: Path, guard: Guard, limited: bool) -> Verdict:
    folder = work / "case"
    for name, content in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "in").mkdir(parents=True, exist_ok=True)
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")
    os.chdir(folder)
    try:
        return _limited(kind, folder, guard) if limited else _verdict(kind, folder)
    finally:
        tempfile.tempdir = None
        os.chdir(work)
        shutil.rmtree(folder, ignore_errors=True)


def _limited(kind: Kind, folder: Path, guard: Guard) -> Verdict:
    before, peak = _resident(), _peak()
    guard.crimes = []
    space = int(_status("VmSize"))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    # Far beyond the limit: it protects the machine. The limit itself is held against the peak, since an error for lack
    # of memory may be taken for the data's.
    resource.setrlimit(resource.RLIMIT_AS, (space + 8 * kind.megabytes * MIB + 2048 * MIB, hard))
    signal.setitimer(signal.ITIMER_PROF, kind.seconds)
    try:
        guard.begin(folder)
        verdict = _verdict(kind, folder)
    finally:
        guard.end()
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if guard.crimes:
        return Verdict("failed", guard.crimes[0], "\n".join([*guard.crimes, verdict.shown]))
    now = _peak()
    if now > peak and now - before > kind.megabytes * MIB:
        shown = f"{(now - before) // MIB} MiB, of {kind.megabytes} allowed; {verdict.what}"
        return Verdict("failed", f"memory: {kind.name}", shown)
    return verdict


def _verdict(kind: Kind, folder: Path) -> Verdict:
    try:
        kind.call(folder / "in")
        return Verdict("accepted")
    except BaseException as error:
        return _of(error)


def _of(error: BaseException) -> Verdict:
    """Whether an exception is a refusal, by its class and by who raised it."""
    if _is_named(error):
        return Verdict("refused", type(error).__name__, str(error))
    shown = "".join(traceback.format_exception(error))[-6000:]
    if isinstance(error, Broken):
        return Verdict("failed", *error.args)
    if isinstance(error, Forbidden):
        return Verdict("failed", f"time: {_place(error)}", shown)
    return Verdict("failed", f"{type(error).__name__} {_place(error)}", shown)


def _is_named(error: BaseException) -> bool:
    """Whether it is an error of a class of the house, or the ValueError or FileNotFoundError of a `raise` of its own:
    the towers document these two."""
    if type(error) is Refusal or type(error).__module__.partition(".")[0] in PACKAGES:
        return isinstance(error, ValueError)
    if type(error) not in (ValueError, FileNotFoundError, FileExistsError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return _package(code.co_filename) != "" and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _place(error: BaseException) -> str:
    """The innermost function of the house that an exception passed through."""
    found, walk = "outside", error.__traceback__
    while walk is not None:
        found = _named(walk) or found
        walk = walk.tb_next
    return f"in {found}"


def _named(walk: TracebackType) -> str:
    code = walk.tb_frame.f_code
    package = _package(code.co_filename)
    return f"{package}/{Path(code.co_filename).name}:{code.co_qualname.rpartition('<locals>.')[2]}" if package else ""


def _package(file: str) -> str:
    return next((part for part in Path(file).parts if part in PACKAGES), "") if "/src/" in file else ""


def _too_long(_: int, frame: FrameType | None) -> None:
    raise Forbidden("too much processor time")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
