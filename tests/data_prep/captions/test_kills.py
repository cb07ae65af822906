"""Runs that die: killed at any moment, nothing is paid for twice, and what may have been paid is listed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from data_prep.captions.ledger import RequestLedger

from .conftest import Reply, good, states

COMMAND = [sys.executable, "-c", "import sys; from data_prep.cli import main; sys.exit(main(sys.argv[1:]))"]


def killed_runs(seer, ledger, moments, after=1):
    """Start a run and kill it, once for each number of seconds after its first requests, `after` of them."""
    command = [*COMMAND, "captions", "run", ledger, "--url", seer.url, "--concurrency", "6"]
    for moment in moments:
        asked = len(seer.asked)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(seer.asked) < asked + after and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()


def check_nothing_was_paid_twice(seer, ledger, total, run):
    """After kills: no request was computed twice; what the service computed and nobody heard is listed, no more."""
    seer.settle()
    assert max(seer.computed.values()) == 1
    assert run() == 0
    assert max(seer.computed.values()) == 1
    found = states(ledger)
    lost = len(RequestLedger(ledger).perhaps_paid())
    assert found["accepted"] + lost == total
    assert found["accepted"] <= len(seer.computed) <= total  # the rest had been noted as sent and not yet left
    assert lost == found.get("sent", 0)
    if lost:
        assert run("--resend", "perhaps-paid") == 0
    assert states(ledger) == {"accepted": total}
    assert sum(count == 2 for count in seer.computed.values()) <= lost
    assert max(seer.computed.values()) <= 2


def test_killed_in_the_middle_nothing_is_paid_twice(seer, planned, run, ledger):
    total = planned(12)
    # Some are answered; the others take until the process is killed, however busy the machine is.
    seer.behave = lambda asked: Reply(body=good(asked).body, seconds=0.03 if asked.number % 10 < 5 else 1)
    killed_runs(seer, ledger, [0, 0], after=8)
    assert 0 < len(seer.asked) < total
    seer.behave = good
    check_nothing_was_paid_twice(seer, ledger, total, run)


@pytest.mark.full
def test_killed_at_twenty_moments_nothing_is_paid_twice(seer, planned, run, ledger):
    total = planned(80)
    seer.behave = lambda asked: Reply(body=good(asked).body, seconds=0.02 * (1 + asked.number % 3))
    killed_runs(seer, ledger, [0.011 * moment for moment in range(20)])
    assert 0 < len(seer.asked) < total
    check_nothing_was_paid_twice(seer, ledger, total, run)


def test_an_answer_that_was_saved_but_not_parsed_when_the_run_died_is_judged_and_not_bought_again(
    seer, planned, run, ledger, monkeypatch
):
    planned(2, languages=["en"])

    class Died(Exception):
        pass

    def die(*_):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.captions.verdicts.verdict_on", die)
        with pytest.raises(Died):
            run()
    assert states(ledger) == {"planned": 1, "received": 1}
    assert run() == 0
    assert states(ledger) == {"accepted": 2}
    assert len(seer.asked) == 2


def test_an_interrupted_run_waits_for_what_is_under_way(seer, planned, ledger):
    total = planned(10)
    sent = threading.Event()
    seer.behave = lambda asked: (asked.number < 2 or sent.wait(300), good(asked))[1]
    command = [*COMMAND, "captions", "run", ledger, "--url", seer.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(seer.asked) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    sent.set()
    _, err = process.communicate()
    assert process.returncode == 2
    assert "stopped: SIGINT" in err
    found = states(ledger)
    assert set(found) == {"accepted", "planned"}
    assert found["accepted"] == len(seer.asked) < total
