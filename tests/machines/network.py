"""Machines that are network namespaces of this one, on a bridge, each with a name, a disk and an ssh server of its own.

What they share is what machines on a shared file system share, and the kernel: processors, main memory and the clock.
A link's rate is set by tc, and its delay where the kernel has netem.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

BRIDGE, SUBNET = "trilith-net", "10.77.0"
STORE = f"{SUBNET}.254"
NEEDED = ("ip", "tc", "nsenter", "unshare", "mount", "ssh", "sshd", "ssh-keygen", "pdsh")

SERVER = """
Port 22
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
StrictModes no
UsePAM no
PidFile none
"""
CLIENT = """
Host *
    User root
    IdentityFile {keys}/user
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


class Machine:
    """One of the machines.

    Args:
        number: from 0. name: of the host and of the namespace. disk: what it finds at the common path of disks.
        holder: a process in all of its namespaces, its ssh server.
    """

    def __init__(self, number: int, disk: Path, holder: subprocess.Popen[bytes]):
        self.number, self.disk, self.holder = number, disk, holder
        self.name, self.address, self.link = f"trilith-{number}", f"{SUBNET}.{number + 1}", f"trilith{number}"

    def words(self, *words: str) -> list[str]:
        """The command that runs another one on this machine, in the folder in which it is started."""
        return [
            "nsenter",
            "-t",
            str(self.holder.pid),
            "-m",
            "-n",
            "-u",
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
            str(Path.cwd()),
            *words,
        ]

    def processes(self) -> list[int]:
        """All that run on it, but for its ssh server."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split() if int(pid) != self.holder.pid]

    def cut_power(self) -> None:
        """The link goes first, so that no other machine gets a last word."""
        _run("ip", "link", "set", self.link, "down")
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def return_(self) -> None:
        _run("ip", "link", "set", self.link, "up")


class Network:
    """So many machines, between `with` and its end.

    Args:
        folder: for keys and disks. count: of machines. rate: of each link, in tc's words ("1gbit"). delay: of each
        link, one way ("1ms"); "" for none.

    Attributes:
        disk: a path at which each machine finds a disk of its own. ssh: a folder with the `ssh` that knows the keys.

    Raises:
        OSError: no root, no namespaces, or a program is missing; says which.
    """

    def __init__(self, folder: Path, count: int, rate: str, delay: str = ""):
        if missing := [name for name in NEEDED if shutil.which(name) is None]:
            raise OSError(f"no {', '.join(missing)} here (Debian: apt install iproute2 openssh-server pdsh)")
        if os.geteuid() != 0:
            raise OSError("only root may make network namespaces; run this with sudo")
        self.folder, self.count, self.rate, self.delay = folder, count, rate, delay
        self.keys, self.ssh, self.disk = folder / "keys", folder / "bin", folder / "disk"
        self.machines: list[Machine] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as undo:
            self._keys()
            undo.callback(_quiet, "ip", "link", "delete", BRIDGE)
            _quiet("ip", "link", "delete", BRIDGE)  # what a killed run left
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "address", "add", f"{STORE}/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            for number in range(self.count):
                undo.callback(self._remove, number)
                self.machines.append(self._add(number))
            for machine in self.machines:
                _until(lambda m=machine: _answers(m.address), f"the ssh server of {machine.name}")  # type: ignore[misc]
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _keys(self) -> None:
        for path in (self.keys, self.ssh, self.disk):
            path.mkdir(parents=True, exist_ok=True)
        for name in ("host", "user"):
            if not (self.keys / name).exists():
                _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.keys / name))
        (self.keys / "sshd_config").write_text(SERVER.format(keys=self.keys))
        (self.keys / "ssh_config").write_text(CLIENT.format(keys=self.keys))
        ssh = self.ssh / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.keys}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its rights; it does not start without

    def _add(self, number: int) -> Machine:
        name, link, inside = f"trilith-{number}", f"trilith{number}", f"trilith{number}i"
        self._remove(number)
        hosts = "".join(f"{SUBNET}.{k + 1} trilith-{k}\n" for k in range(self.count))
        place = Path("/etc/netns") / name  # `ip netns exec` mounts what is there over /etc
        place.mkdir(parents=True)
        (place / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", inside)
        _run("ip", "link", "set", link, "master", BRIDGE, "up")
        _run("ip", "link", "set", inside, "netns", name)
        within = ("ip", "netns", "exec", name)
        _run(*within, "ip", "address", "add", f"{SUBNET}.{number + 1}/24", "dev", inside)
        for each in ("lo", inside):
            _run(*within, "ip", "link", "set", each, "up")
        for command, end in (((), link), (within, inside)):
            _run(*command, "tc", "qdisc", "add", "dev", end, "root", "handle", "1:", "tbf",
                 "rate", self.rate, "burst", "256kb", "latency", "100ms")  # fmt: skip
            if self.delay:
                _run(*command, "tc", "qdisc", "add", "dev", end, "parent", "1:1", "netem", "delay", self.delay)
        disk = self.folder / "disks" / str(number)
        disk.mkdir(parents=True, exist_ok=True)
        script = 'hostname "$1" && mount --bind "$2" "$3" && exec "$4" -D -e -f "$5"'
        server, config = str(shutil.which("sshd")), str(self.keys / "sshd_config")
        words = [
            *within,
            "unshare",
            "-m",
            "-u",
            "sh",
            "-c",
            script,
            "sh",
            name,
            str(disk),
            str(self.disk),
            server,
            config,
        ]
        with (self.folder / f"sshd-{number}.log").open("ab") as log:
            return Machine(number, disk, subprocess.Popen(words, stdout=log, stderr=log))

    def _remove(self, number: int) -> None:
        name = f"trilith-{number}"
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        for pid in listed.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _quiet("ip", "link", "delete", f"trilith{number}")
        _quiet("ip", "netns", "delete", name)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def has_delay() -> bool:
    """Whether this kernel has netem, which delays packets."""
    _quiet("ip", "link", "delete", "trilith-try")
    _run("ip", "link", "add", "trilith-try", "type", "bridge")
    try:
        return not _quiet("tc", "qdisc", "add", "dev", "trilith-try", "root", "netem", "delay", "1ms")
    finally:
        _quiet("ip", "link", "delete", "trilith-try")


@contextlib.contextmanager
def store(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Serves a folder to the machines: (its URL, bytes of shards sent to each address)."""
    sent: Counter[str] = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def copyfile(self, source: object, output: object) -> None:
            if self.path.split("?")[0].endswith(".tar"):
                sent[self.client_address[0]] += os.fstat(source.fileno()).st_size  # type: ignore[attr-defined]
            super().copyfile(source, output)  # type: ignore[arg-type, type-var]

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer((STORE, 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{STORE}:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, 22), timeout=1):
        return True
    return False


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise OSError(f"{what} does not answer")
        time.sleep(0.05)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def _quiet(*words: str) -> int:
    command: Sequence[str] = words
    return subprocess.run(command, capture_output=True, check=False).returncode
