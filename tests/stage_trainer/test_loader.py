"""The processes that make batches ahead: when they end, and when they do not."""

import ctypes
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from data_prep.shards import Dataset as Shards
from data_prep.shards import DatasetWriter
from stage_trainer.errors import UserError
from stage_trainer.run import loader
from stage_trainer.run.loader import batches, worker_deaths_explained
from stage_trainer.run.shortages import NO_FILES, NO_SHARED_MEMORY, shortages_explained
from torch.utils.data import Dataset


class Numbers(Dataset):
    """0, 1, and then nothing for hours."""

    def __getitem__(self, step):
        time.sleep(10_000 * (step > 1))
        return step


def test_workers_ignore_what_asks_to_stop_and_are_gone_once_batches_are_closed():
    items = batches(Numbers(), 0, 100, workers=1)
    assert [next(items), next(items)] == [0, 1]
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(worker.pid, number)
    assert all(worker.is_alive() for worker in workers)
    items.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "ran out of memory"),
        pytest.param(signal.SIGBUS, "ran out of shared memory (/dev/shm", marks=pytest.mark.full),
        pytest.param(None, "ended by itself", marks=pytest.mark.full),
    ],
)
def test_a_worker_that_dies_is_named_with_the_likely_cause_and_the_others_go(number, reason):
    class Dying(Dataset):
        def __getitem__(self, step):
            if step == 1:
                os.kill(os.getpid(), number) if number else os._exit(3)
            time.sleep(10_000 * (step > 1))
            return step

    with pytest.raises(UserError) as raised, worker_deaths_explained(2):  # noqa: PT012 (torch raises where it can)
        items = batches(Dying(), 0, 100, workers=2)
        try:
            for _ in items:
                pass
        finally:
            items.close()
    assert reason in str(raised.value)
    assert "lower workers (now 2), cache_megabytes or the batch" in str(raised.value)
    assert not multiprocessing.active_children()


class Numbered(Dataset):
    """Its first reader of step 3 comes to some harm; a note of that is in `folder`."""

    def __init__(self, folder, harm, times=1):
        self.folder, self.harm, self.times = folder, harm, times

    def __getitem__(self, step):
        if step == 3 and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), self.harm)
        return torch.full((3,), step)


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_are_started_again_once_and_bring_the_same_batches(tmp_path, harm):
    said = []
    with worker_deaths_explained(2):
        items = batches(
            Numbered(tmp_path, harm), 0, 8, workers=2, limit=300 if harm == signal.SIGKILL else 8, say=said.append
        )
        assert [item.tolist() for item in items] == [[step] * 3 for step in range(8)]
    (line,) = said
    assert len(list(tmp_path.iterdir())) == 1
    # A batch before step 3 may be lost with the worker that had made it and not handed over yet.
    assert re.search("; the workers are started again, once, from step [0-3]$", line)
    if harm == signal.SIGKILL:
        assert ") was killed, most likely because" in line
    else:
        assert "brought no batch in 8 seconds and is stuck or stopped; if it only took long, raise limits.batch" in line
    assert not multiprocessing.active_children()


def test_a_worker_that_is_stopped_again_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="stuck or stopped.*raise limits.batch"), worker_deaths_explained(1):
        for _ in batches(Numbered(tmp_path, signal.SIGSTOP, times=9), 0, 8, workers=1, limit=1, say=str):
            pass
    assert not multiprocessing.active_children()


SHORT_OF = """
import resource, sys, torch
from stage_trainer.errors import UserError
from stage_trainer.run.loader import batches, worker_deaths_explained

class Big(torch.utils.data.Dataset):
    def __getitem__(self, step):
        return [torch.ones(2**18) for _ in range(int(sys.argv[1]))]

if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
kept = []
try:
    with worker_deaths_explained(2):
        for item in batches(Big(), 0, 40, workers=2):
            kept.append(item)
except UserError as error:
    print("message:", error)
"""


def short_of(words, tensors, files):
    command = [*words, sys.executable, "-c", SHORT_OF, str(tensors), str(files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(("tensors", "files"), [(64, 40), (4, 60)])  # a worker runs out of them, then this process
def test_too_few_file_descriptors_end_the_run_and_the_message_says_how_many_there_may_be(tensors, files):
    assert f"message: a process has no file descriptor left; it may have {files}: raise that" in (
        short_of([], tensors, files)
    )


def test_a_full_shared_memory_ends_the_run_and_the_message_says_how_large_it_is():
    mounted = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "bash"]
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    assert "message: shared memory (/dev/shm, 8 MiB) has no room for the next batch; raise it (of a container" in (
        short_of(mounted, 4, 0)
    )


def test_a_batch_that_cannot_be_handed_over_ends_its_worker_with_the_reason(monkeypatch):
    """What a small /dev/shm shows above, where nobody may mount one."""
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code))
    codes = []
    loader._undelivered(RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device"), 0)
    loader._undelivered(OSError(24, "Too many open files"), 0)
    loader._undelivered(ValueError("another"), 0)
    assert codes == [NO_SHARED_MEMORY, NO_FILES, 1]


def test_an_error_that_is_not_a_workers_death_stays_as_it_is():
    with pytest.raises(RuntimeError, match="^a bug$"), worker_deaths_explained(2):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (" Killed", "ran out of memory"),
        (" Bus error", "ran out of shared memory (/dev/shm"),
        (" Terminated", "ended by itself (Terminated)"),
    ],
)
def test_each_signal_has_its_own_likely_cause(by, reason):
    with pytest.raises(UserError) as raised, worker_deaths_explained(2):
        raise RuntimeError(f"DataLoader worker (pid 7) is killed by signal:{by}. ")
    assert reason in str(raised.value)


def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_named_with_its_signal(monkeypatch):
    class HalfHandedOver:
        """A loader whose worker dies first; the other end of its pipe then hears of nothing else."""

        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            worker = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), signal.SIGKILL))
            worker.start()
            return iter(self._broken, None)

        @staticmethod
        def _broken():
            raise ConnectionResetError("the pipe is closed")

    monkeypatch.setattr(loader, "DataLoader", HalfHandedOver)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid \d+\) is killed by signal: Killed$"):
        next(batches(Numbers(), 0, 2, workers=1))


class WhatAWorkerIs(Dataset):
    """The signals that it could not hear when it was made, and the one that it gets when its parent ends."""

    at_its_start: frozenset = frozenset()

    def __getitem__(self, step):
        at_parents_end = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(at_parents_end))  # PR_GET_PDEATHSIG
        return set(self.at_its_start), at_parents_end.value


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_signal_reaches_a_worker_before_it_ignores_them_and_it_dies_with_its_parent():
    def note() -> None:
        WhatAWorkerIs.at_its_start = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    os.register_at_fork(after_in_child=note)
    items = batches(WhatAWorkerIs(), 0, 1, workers=1)
    held, at_parents_end = next(items)
    items.close()
    assert held >= {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    assert at_parents_end == signal.SIGKILL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def test_a_process_that_may_open_no_more_files_replaces_no_sample(tmp_path, monkeypatch):
    """The data are sound: others would be trained on, and the ledger would call these corrupt."""
    with DatasetWriter(tmp_path / "d", kind="text-pairs", source="d") as writer:
        writer.write("k", {"json": b"{}"}, languages=["en"], tokens=None)
    data = Shards.open(tmp_path / "d")

    def refuses(name):
        raise OSError(errno.EMFILE, "Too many open files")

    class Reading(Dataset):
        def __getitem__(self, step):
            return data.read(0)

    monkeypatch.setattr(data, "open_file", refuses)
    with pytest.raises(UserError, match="no file descriptor left.*ulimit -n"):
        next(batches(Reading(), 0, 1, workers=0))


def test_a_library_that_may_open_no_more_files_gives_the_same_message():
    """gloo, for the sockets of a new group of ranks."""
    with pytest.raises(UserError, match=r"no file descriptor left.*ulimit -n"), shortages_explained():
        raise RuntimeError("[enforce fail at loop.cc:105] fd_ != -1. -1 vs -1. epoll_create: Too many open files")
    with pytest.raises(RuntimeError, match="of another kind"), shortages_explained():
        raise RuntimeError("of another kind")
