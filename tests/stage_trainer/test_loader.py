"""The processes that make batches ahead: when they end, and when they do not."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time

import pytest
from stage_trainer.errors import UserError
from stage_trainer.run import loader
from stage_trainer.run.loader import batches, worker_deaths_explained
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
