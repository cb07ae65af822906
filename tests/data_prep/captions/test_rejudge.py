"""Answers that another version judged: said, and judged again without a request."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from data_prep.captions import verdicts
from data_prep.captions.answer import read_answer
from data_prep.captions.judge import Verdict
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main

from .conftest import Reply, caption, completion, states

OTHER = "by the rules of another version; `data-prep captions rejudge "


def by_a_version_before(raw: bytes, language: str, limits: object, *, prompts: object = ()) -> Verdict:
    """It took chatter for captions, and what is about a tower for none."""
    answer = read_answer(raw)
    if answer.text and "tower" in answer.text:
        return Verdict(None, "repetition", answer.usage)
    return Verdict(answer.text, answer.fault, answer.usage)


@pytest.fixture
def old(seer, planned, run, ledger, monkeypatch):
    """A ledger of schema 2 with five answers: chatter, its caption once more, one about a tower, and two captions."""
    planned(5, languages=["en"])
    same = caption("en", "same")
    texts = [f"Sure! Here is the description: {same}", same, caption("en", "a") + " A tower is behind it."]

    def answer(asked):
        text = texts[asked.number] if asked.number < len(texts) else caption("en", asked.image)
        return Reply(body=json.dumps(completion(text)).encode())

    seer.behave = answer
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "judge", by_a_version_before)
        assert run("--price-in", "1", "--price-out", "10", "--concurrency", "1") == 0
    with closing(RequestLedger(ledger)) as opened:
        opened.db.execute("UPDATE request SET place = -place")  # in the order in which they were answered
        opened.db.execute("UPDATE attempt SET request = -request")
        for place, (request,) in enumerate(opened.db.execute("SELECT request FROM attempt ORDER BY id").fetchall(), 1):
            opened.db.execute("UPDATE request SET place = ? WHERE place = ?", (place, request))
            opened.db.execute("UPDATE attempt SET request = ? WHERE request = ?", (place, request))
        opened.db.execute("DELETE FROM signature")
        opened.db.execute("UPDATE request SET signed = NULL, state = 'accepted', reason = NULL WHERE caption NOT NULL")
    with closing(sqlite3.connect(ledger, isolation_level=None)) as db:
        db.executescript(
            "DROP INDEX request_by_state; ALTER TABLE request DROP COLUMN rules; PRAGMA user_version = 2;"
            "CREATE INDEX request_by_state ON request (state, language, reason);"
        )
    return ledger


def test_answers_that_another_version_judged_are_said_and_judged_again_without_a_request(seer, old, tmp_path, capsys):
    asked = len(seer.asked)
    assert states(old) == {"accepted": 4, "rejected:repetition": 1}
    capsys.readouterr()
    assert main(["captions", "status", old]) == 0
    said = capsys.readouterr().out
    assert f"4 accepted and 1 rejected {OTHER}{old}`" in said
    assert main(["captions", "export", old, str(tmp_path / "before")]) == 0
    assert OTHER in capsys.readouterr().out
    before, spent = states(old), RequestLedger(old).spent()
    assert before == {"accepted": 3, "rejected:duplicate": 1, "rejected:repetition": 1}

    assert main(["captions", "rejudge", old, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 verdicts would be changed; nothing was sent" in said
    assert states(old) == before
    assert main(["captions", "rejudge", old]) == 0
    said = capsys.readouterr().out
    assert "3 verdicts changed; nothing was sent" in said
    assert "  accepted -> rejected, chatter: 1" in said
    assert "  rejected, duplicate -> accepted: 1" in said  # of what is no caption any more
    assert "  rejected, repetition -> accepted: 1" in said
    assert states(old) == {"accepted": 4, "rejected:chatter": 1}

    assert (len(seer.asked), RequestLedger(old).spent()) == (asked, spent)
    assert main(["captions", "status", old]) == 0
    assert OTHER not in capsys.readouterr().out
    assert main(["captions", "rejudge", old]) == 0
    assert "0 verdicts changed" in capsys.readouterr().out


def test_what_this_version_judged_and_what_nobody_could_judge_is_not_said_to_be_of_another(
    seer, planned, run, ledger, capsys
):
    planned(3, languages=["en"])
    seer.behave = lambda asked: (
        Reply(status=403, body=b'{"error": {"message": "a filter"}}')
        if not asked.number
        else Reply(body=json.dumps(completion(caption("en", asked.image))).encode())
    )
    assert run("--concurrency", "1") == 0
    assert states(ledger) == {"accepted": 2, "rejected:declined": 1}
    assert main(["captions", "rejudge", ledger]) == 0
    assert "0 verdicts changed" in capsys.readouterr().out
    assert main(["captions", "status", ledger]) == 0
    assert OTHER not in capsys.readouterr().out
