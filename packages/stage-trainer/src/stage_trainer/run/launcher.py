"""Runs the `deepspeed` command for launch/stageN.sh: `python -m stage_trainer.run.launcher OPTIONS SCRIPT ARGUMENTS`.

When a run is asked to stop, DeepSpeed's own processes do not wait for its checkpoint: `deepspeed` ends at once, and
its launch.py kills the ranks after thirty seconds. Here signals reach only the ranks, and their exit code is that of
the whole command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from stage_trainer.run.forwarding import pack
from stage_trainer.run.stop import SIGNALS

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""NVIDIA's, Windows' for WSL, AMD's."""

_NOTICE_LOST_MACHINES = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""For ssh, which `deepspeed` runs through pdsh: without it the command waits for ever for a machine that has lost its
power or its network, though all ranks have ended. What the user's own PDSH_SSH_ARGS_APPEND says comes first, and ssh
takes the first value."""


def main(options: Sequence[str] | None = None) -> int:
    """Runs `deepspeed` with these options and returns its exit code."""
    # Its log repeats what the ranks say; --log_level info shows it.
    words = ["deepspeed", "--log_level", "critical", *(sys.argv[1:] if options is None else options)]
    if _through_ssh(words):  # then `deepspeed` itself has to signal the other machines
        words, secret = pack(words, os.environ)
        if secret:
            print(f"{', '.join(secret)} stay on this machine; set them, or log in, on each of the others", flush=True)
        given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        os.environ["PDSH_SSH_ARGS_APPEND"] = f"{given} {_NOTICE_LOST_MACHINES}".strip()
        os.execvp(words[0], words)
    if not any(map(os.path.exists, _GPU_DRIVERS)):  # DeepSpeed would warn in every process
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    print("starting DeepSpeed's launcher …", flush=True)
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # children inherit it; the ranks unblock
    try:
        child = subprocess.Popen(words, process_group=0)  # its own group: Ctrl-C reaches the ranks once, from here
    except FileNotFoundError:
        print("stage-trainer: there is no deepspeed command; bash launch/environment.sh makes .venv", file=sys.stderr)
        return 2
    asked: list[int] = []

    def tell(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def pass_on(number: int, frame: FrameType | None) -> None:
        tell(signal.SIGINT if asked and number == signal.SIGINT else signal.SIGTERM)  # a second Ctrl-C interrupts
        asked.append(number)

    def pause(number: int, frame: FrameType | None) -> None:
        tell(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        tell(signal.SIGCONT)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, pass_on)
    signal.signal(signal.SIGTSTP, pause)
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(timeout=1)
            if code > 192:  # set by launch.py for a rank that a signal ended
                print(f"a rank was ended by signal {256 - code}, perhaps out of memory", file=sys.stderr)
            return code if code >= 0 else 128 - code
        if asked:  # again, for ranks that had not started yet
            tell(signal.SIGTERM)


def _through_ssh(words: Sequence[str]) -> bool:
    """Whether `deepspeed` would start ranks on other machines itself."""
    hosts = any(word.split("=")[0] in ("--hostfile", "-H") for word in words) or os.path.exists("/job/hostfile")
    return hosts and "--no_ssh" not in words


if __name__ == "__main__":
    sys.exit(main())
