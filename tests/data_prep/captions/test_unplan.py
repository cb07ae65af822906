"""Unplanning: requests that were never sent are removed, others stay."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main

from .conftest import Reply, good, states


def unplan(ledger, *options):
    return main(["captions", "unplan", ledger, *options])


def rows(ledger, table):
    return RequestLedger(ledger).db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_what_was_sent_answered_or_put_back_stays_and_only_the_rest_goes(seer, planned, run, ledger, capsys):
    planned(8)
    trouble = {1: Reply(drop=True), 2: Reply(500), 3: Reply(body=b"{")}
    seer.behave = lambda asked: trouble.get(asked.number) or good(asked)
    assert run("--limit", "6", "--tries", "1", "--price-in", "1", "--price-out", "1") == 0
    before = {"accepted": 3, "sent": 1, "rejected:malformed": 1}
    assert states(ledger) == {**before, "planned": 19}
    attempts, spent = rows(ledger, "attempt"), RequestLedger(ledger).spent()
    capsys.readouterr()
    assert unplan(ledger) == 0
    assert capsys.readouterr().out == ("18 requests removed from the plan\n1 stay planned: they were sent before\n")
    assert states(ledger) == {**before, "planned": 1}
    assert (rows(ledger, "attempt"), RequestLedger(ledger).spent()) == (attempts, spent)
    assert unplan(ledger) == 0  # the one is still there
    assert "0 requests removed" in capsys.readouterr().out
    seer.behave = good
    assert run() == 0
    assert states(ledger) == {"accepted": 4, "sent": 1, "rejected:malformed": 1}
    assert len(seer.asked) == 7


def test_a_choice_of_languages_data_sets_models_and_prompts(planned, make_images, ledger, capsys, tmp_path):
    planned(3)
    other = str(make_images(4, name="others"))  # of its four pictures three are known
    plan = ["captions", "plan", ledger, other, "--model", "seer-2", "--languages", "en"]
    assert main(plan) == 0
    assert rows(ledger, "request") == 9 + 4
    assert unplan(ledger, "--languages", "de", "fr", "--model", "seer-1") == 0
    assert rows(ledger, "request") == 3 + 4
    assert rows(ledger, "prompt") == 1
    capsys.readouterr()
    assert unplan(ledger, str(tmp_path / "images")) == 2
    assert "nothing that is planned fits" in capsys.readouterr().err  # the later plan found them all in its own
    assert unplan(ledger, other, "--model", "seer-2", "--prompt-version", "v1") == 0
    assert (rows(ledger, "request"), rows(ledger, "image"), rows(ledger, "recipe")) == (3, 3, 1)
    assert main(plan) == 0  # and planned again
    assert rows(ledger, "request") == 7


def test_a_prompt_that_nothing_was_asked_with_may_be_written_anew(make_images, ledger, tmp_path):
    prompts = tmp_path / "prompts"
    (prompts / "mine").mkdir(parents=True)
    (prompts / "mine/en.txt").write_text("Describe.")
    plan = ["captions", "plan", ledger, str(make_images(1)), "--model", "m", "--languages", "en"]
    plan += ["--prompt-version", "mine", "--prompts", str(prompts)]
    assert main(plan) == 0
    (prompts / "mine/en.txt").write_text("Describe it.")
    assert main(plan) == 2
    assert unplan(ledger) == 0
    assert main(plan) == 0
    assert RequestLedger(ledger).planned(1)[0].text == "Describe it."


def test_a_ledger_in_use_and_a_language_that_is_none_are_refused(planned, ledger, capsys):
    planned(1)
    with RequestLedger(ledger).exclusive():
        assert unplan(ledger) == 2
    assert "in use by another run" in capsys.readouterr().err
    assert unplan(ledger, "--languages", "xx") == 2
    assert "unknown language 'xx'" in capsys.readouterr().err
    assert states(ledger) == {"planned": 3}


@pytest.mark.parametrize("byte", [b"\xff", b"\0"])  # zeros read as pages without rows: "nothing is planned"
@pytest.mark.parametrize("command", ["status", "unplan", "plan"])
def test_a_damaged_page_of_the_ledger_is_one_message(make_images, planned, ledger, capsys, command, byte):
    planned(8)
    database = sqlite3.connect(ledger)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    path = Path(ledger)
    path.write_bytes(path.read_bytes()[:4096] + byte * (path.stat().st_size - 4096))
    capsys.readouterr()
    more = [str(make_images(2, name="more")), "--model", "seer-2", "--languages", "en"] if command == "plan" else []
    assert main(["captions", command, ledger, *more]) == 2
    said = capsys.readouterr().err
    assert f"data-prep: {ledger} is damaged (" in said
    assert "restore it from a copy" in said


def test_a_damaged_ledger_that_is_refused_keeps_its_journal(planned, ledger):
    planned(8)
    path = Path(ledger)
    database = sqlite3.connect(ledger)  # while it is open, what is committed stands in the journal
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.execute("UPDATE request SET state = 'sent' WHERE rowid = 1")
    database.commit()
    whole, journal = path.read_bytes(), Path(f"{ledger}-wal").read_bytes()
    assert journal
    killed = path.with_name("killed.sqlite")
    for content in (b"", whole[: len(whole) // 2], whole[:4096] + bytes(len(whole) - 4096)):
        killed.write_bytes(content)
        Path(f"{killed}-wal").write_bytes(journal)
        # In a process of its own: as it ends, SQLite moves a journal into the ledger and deletes it.
        status = [sys.executable, "-c", "import data_prep.cli as c; c.main()", "captions", "status", str(killed)]
        said = subprocess.run(status, capture_output=True, text=True, check=False).stderr
        assert "restore it from a copy" in said or "not a ledger" in said
        assert Path(f"{killed}-wal").read_bytes() == journal
    killed.write_bytes(whole)
    assert states(str(killed)) == {"sent": 1, "planned": 23}
    database.close()
