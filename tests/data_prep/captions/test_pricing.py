"""What runs cost: a budget that holds, what was paid without prices, what the rest would cost."""

from __future__ import annotations

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main

from .conftest import Reply, good, states


def test_the_budget_is_never_exceeded_and_stops_the_run(seer, planned, run, ledger, capsys):
    planned(20)
    # An answer costs (900 · 1 + 100 · 10) / 1e6 = 0.0019; at most, before it is known, 500 tokens come: 0.0059.
    prices = ("--price-in", "1", "--price-out", "10", "--image-tokens", "700")
    assert run(*prices, "--budget", "0.04") == 2
    assert "stopped: the budget of 0.04" in capsys.readouterr().err
    spent = RequestLedger(ledger).spent()
    assert spent == pytest.approx(0.0019 * len(seer.asked))
    assert 0.04 - 0.0060 < spent <= 0.04
    before = len(seer.asked)
    assert run(*prices, "--budget", "0.04") == 2
    assert len(seer.asked) == before
    assert run(*prices, "--budget", "1") == 0
    assert states(ledger) == {"accepted": 60}


def test_what_was_paid_without_prices_counts_against_a_budget(seer, planned, run, ledger):
    planned(2)
    seer.behave = lambda asked: Reply(drop=True) if asked.number == 2 else good(asked)
    assert run("--limit", "3") == 0
    prices = ("--price-in", "1", "--price-out", "10", "--image-tokens", "100")
    assert run(*prices, "--budget", "0.012") == 2
    # Two answers by their tokens; for the one that broke off, the most: 900 tokens, as others took, and 500 back.
    assert RequestLedger(ledger).spent() == pytest.approx(2 * 0.0019 + 0.0059)
    assert len(seer.asked) == 3
    assert run(*prices, "--budget", "1") == 0
    assert RequestLedger(ledger).spent() == pytest.approx(5 * 0.0019 + 0.0059)


def test_a_dry_run_asks_nothing_and_projects_from_answers_once_there_are_some(seer, planned, run, ledger, capsys):
    planned(20, languages=["en", "de"])
    prices = ("--price-in", "1", "--price-out", "10")
    assert run("--dry-run", *prices) == 0
    out = capsys.readouterr().out
    assert "40 requests planned; nothing was sent" in out
    assert "20,000 out (at most, from a sample of images)" in out
    assert not seer.asked
    assert run("--limit", "24", *prices) == 0
    assert len(seer.asked) == 24
    capsys.readouterr()
    assert run("--dry-run", *prices) == 0
    out = capsys.readouterr().out
    assert "14,400 tokens in, 1,600 out (from 24 answers in the ledger)" in out
    assert "cost: 0.03; as batches 0.02\nspent, at most: 0.0456\n" in out
    assert len(seer.asked) == 24


def test_attempts_without_a_price_are_counted_until_a_run_has_prices(seer, planned, run, ledger, capsys):
    planned(2)
    seer.behave = lambda asked: {1: Reply(drop=True), 2: Reply(500)}.get(asked.number) or good(asked)
    assert run("--limit", "4", "--tries", "1") == 0  # two answers, one perhaps paid, one that costs nothing
    prices = ("--price-in", "1", "--price-out", "10", "--image-tokens", "100")
    for command in (["captions", "status", ledger], ["captions", "run", ledger, "--dry-run", *prices]):
        capsys.readouterr()
        assert main(command) == 0
        assert "spent, at most: 0.0000\n  and 3 attempts made without prices; " in capsys.readouterr().out
    assert run(*prices) == 0
    capsys.readouterr()
    assert main(["captions", "status", ledger]) == 0
    out = capsys.readouterr().out
    assert f"spent, at most: {5 * 0.0019 + 0.0059:.4f}\n" in out
    assert "without prices" not in out
