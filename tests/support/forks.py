"""Processes that begin with PyTorch, DeepSpeed and our packages imported, which costs any other one two and a half
seconds of processor time.

A server imports them once and forks itself for every process that is asked for:

    done = forks.run([sys.executable, "-c", code], folder)
    with open(log, "w") as file:
        process = forks.start([command("stage-trainer"), "train", …], folder, {"RANK": "0"}, file, file)
    assert process.wait() == 0

It is a process like any other, with a session, a working directory, an environment and streams of its own: it is
killed, stopped and waited for by its number, and ends as Python ends. What it cannot have of its own are variables that
libraries read when they are imported; `LATER` are those that none does. If `changes` has others, and for programs that
are not Python's or ours, `start` starts a fresh process. (What differs in the tests' own process does not count: there
libraries set variables while tests run.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ports import free_port

SUPPORT = Path(__file__).parent
LIBRARIES = (
    "data_prep.cli", "deepspeed", "safetensors.torch", "sentencepiece",
    "stage_trainer.checkpoint.save", "stage_trainer.evaluation.retrieval", "stage_trainer.trainer", "tokenizers",
    "torch.utils.tensorboard",
)  # fmt: skip
"""What training imports. Without triton: to free what that has made takes a second at the end of each process."""
FOREIGN = (
    "torch",
    "torchvision",
    "torch._dynamo",
    "PIL.Image",
    "tokenizers",
    "safetensors.torch",
    "scipy.stats",
)
"""What libraries of models import, whichever of them are installed; none of these libraries, and nothing of ours."""
COMMANDS = {"stage-trainer": "stage_trainer.cli", "data-prep": "data_prep.cli"}
LATER = {
    *("PYTHONPATH", "RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"),
    "GLOO_SOCKET_IFNAME",
}
LONGEST = 1500.0
"""Seconds that a program may take on a busy machine."""
LATER_OF_FOREIGN = {*LATER, "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""The server's: its streams, which forks inherit, keep nothing back, so that both come in their order."""


class Fork:
    """A process of the server's, with what `subprocess.Popen` has for one that writes to files."""

    def __init__(self, words: Sequence[str], status: IO[bytes]):
        self.args, self._status = list(words), status
        said = status.readline()
        assert said, "the server of forks has ended; it has said why to stderr"
        self.pid = int(said)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while the process lives."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen | Fork


def start(
    words: Sequence[str],
    folder: Path | str,
    changes: Mapping[str, str],
    stdout: IO[str],
    stderr: IO[str],
    libraries: tuple[str, ...] = LIBRARIES,
) -> Process:
    """Starts a program in a session of its own, `changes` being made to this process' environment.

    The files may be closed at once. Output is not buffered, and one thread computes. `libraries` are those with which
    it begins, if it can be forked: `LIBRARIES`, or `FOREIGN` for one that must not see our packages.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}
    if words[0] == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(SUPPORT)]))
    if not _can_be_forked(words, changes, LATER if libraries == LIBRARIES else LATER_OF_FOREIGN):
        return subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
    request = json.dumps({"words": list(words), "cwd": str(folder), "env": environment}).encode()
    reading, writing = os.pipe()
    with open(os.devnull) as nothing:
        header = len(request).to_bytes(8, "big")
        server = _server(libraries)
        socket.send_fds(server, [header], [nothing.fileno(), stdout.fileno(), stderr.fileno(), writing])
        server.sendall(request)
    os.close(writing)
    return Fork(words, os.fdopen(reading, "rb", buffering=0))


def run(
    words: Sequence[str], folder: Path | str, libraries: tuple[str, ...] = LIBRARIES, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; gives what it said."""
    return together([words], folder, [changes], libraries)


def together(
    programs: Sequence[Sequence[str]],
    folder: Path | str,
    changes: Sequence[Mapping[str, str]],
    libraries: tuple[str, ...] = LIBRARIES,
) -> subprocess.CompletedProcess[str]:
    """Runs programs at once; gives what they said, and the first exit status that is not 0."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        running = [
            start(words, folder, its, out, error, libraries) for words, its in zip(programs, changes, strict=True)
        ]
        try:
            codes = [each.wait(LONGEST) for each in running]
        finally:
            for each in running:
                each.kill()
        said = []
        for file in (out, error):
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(list(programs[0]), next(filter(None, codes), 0), *said)


def of_ranks(ranks: int) -> list[dict[str, str]]:
    """The variables that tell each of several ranks of this machine who it is, without a launcher."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _can_be_forked(words: Sequence[str], changes: Mapping[str, str], later: set[str]) -> bool:
    changed = {name for name, value in changes.items() if value != ENVIRONMENT.get(name)}
    a_command = Path(words[0]).name in COMMANDS and Path(words[0]).parent == Path(sys.executable).parent
    return changed <= later and (a_command or words[0] == sys.executable)


@functools.cache
def _server(libraries: tuple[str, ...]) -> socket.socket:
    """Of this process; it ends with it."""
    ours, its = socket.socketpair()
    subprocess.Popen(
        [sys.executable, __file__, str(its.fileno()), *libraries], pass_fds=[its.fileno()], env=ENVIRONMENT
    )
    its.close()
    return ours


def _serve(connection: socket.socket) -> list[str]:
    """Returns in each process that is forked, with its words."""
    running: dict[int, int] = {}  # by process: where its status is to be said
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            for process in list(running):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    with contextlib.suppress(BrokenPipeError), os.fdopen(running.pop(process), "wb") as pipe:
                        pipe.write(b"%d\n" % os.waitstatus_to_exitcode(status))
        if connection not in ready:
            continue
        request, descriptors = _receive(connection)
        if not request:
            os._exit(0)
        *streams, status = descriptors
        if not (process := os.fork()):
            break
        running[process] = status
        for stream in streams:
            os.close(stream)
    signal.set_wakeup_fd(-1)
    for each in (connection, woken, waker):
        each.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.write(status, b"%d\n" % os.getpid())
    for descriptor in (status, *running.values()):
        os.close(descriptor)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request["words"]


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request and the four files that came with it; nothing once the tests have ended."""
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 4)
    size, text = int.from_bytes(header, "big"), b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text) if header else {}, descriptors


def _become(words: list[str]) -> None:
    """Runs what Python would run, as `__main__`."""
    name, *rest = words
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[0] = str(Path(name).parent)
    if Path(name).name in COMMANDS:
        code, rest = f"import sys; from {COMMANDS[Path(name).name]} import main; sys.exit(main())", words
    elif rest[0] == "-c":
        code, rest = rest[1], ["-c", *rest[2:]]
        sys.path[0] = ""
    else:
        code, main.__file__ = Path(rest[0]).read_text(), rest[0]
        sys.path[:1] = [str(Path(rest[0]).parent), str(SUPPORT)]  # it may be a test that starts itself
    sys.argv = rest
    exec(compile(code, getattr(main, "__file__", "<string>"), "exec"), main.__dict__)


def _main() -> None:
    import atexit
    import gc
    import random
    from importlib import import_module

    for library in sys.argv[2:]:
        with contextlib.suppress(ModuleNotFoundError):
            import_module(library)
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads cannot be forked"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    gc.collect()
    gc.freeze()  # or a process would copy all memory when it looks for garbage
    words = _serve(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    if "triton" in sys.modules:
        atexit.register(gc.unfreeze)  # it complains of what is not freed
    _become(words)


if __name__ == "__main__":
    _main()
