"""The processes that make batches ahead: when they end, and when they do not."""

import multiprocessing
import os
import signal
import time

import pytest
from stage_trainer.errors import UserError
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
