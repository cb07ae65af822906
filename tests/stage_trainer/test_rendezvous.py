"""Ranks find their own run, and no other."""

import datetime
import socket
import sys

import forks
import pytest
from ports import free_port
from stage_trainer.errors import UserError
from stage_trainer.run import rendezvous

BRIEFLY = datetime.timedelta(seconds=300)


def test_a_port_that_is_taken_is_named_with_what_to_do(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"port {port} is taken.*--master_port N"):
            rendezvous._store(0, 2, "run", BRIEFLY)


def test_ranks_that_nobody_told_of_rank_0_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT do not say where rank 0 is"):
        rendezvous._store(1, 2, "run", BRIEFLY)


def test_a_rank_that_comes_to_another_runs_port_leaves_its_keys_alone(monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CROSS_SIZE", raising=False)  # as from srun
    ours, strangers = rendezvous._store(0, 2, "a", BRIEFLY), rendezvous._store(1, 2, "b", BRIEFLY)
    ours.set("address", "of a")
    assert not strangers.check(["address"])
    strangers.set("address", "of b")
    assert ours.get("address") == b"of a"


RANKS = """
import datetime, os, sys, time
from stage_trainer.run import rendezvous
os.environ |= {"CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

def rank(number):
    store = rendezvous._store(number, 3, "run", datetime.timedelta(seconds=300))
    store.add("ranks", 1)
    while store.add("ranks", 0) < 3:
        time.sleep(0.02)
    print(store.add("ranks", 0), flush=True)
    store.add("told", 1)
    while number == 0 and store.add("told", 0) < 3:  # the store ends with its process
        time.sleep(0.02)

for number in (2, 1, 0):
    if not os.fork():
        sys.exit(rank(number))
sys.exit(any(os.wait()[1] for _ in range(3)))
"""


def test_the_default_port_is_left_to_others_and_nothing_stays_behind(tmp_path, monkeypatch):
    """Three ranks of one parent, as of DeepSpeed's launcher, beside a file of a launcher that is no more."""
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("CROSS_SIZE", "1")
        stale = rendezvous._meeting_point(str(tmp_path / "run"))
    assert stale is not None
    stale = stale.with_name(f"{stale.name}0")
    stale.write_text("1")
    done = forks.run([sys.executable, "-c", RANKS], tmp_path)
    assert (done.returncode, done.stdout) == (0, "3\n" * 3), done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [stale.name]
