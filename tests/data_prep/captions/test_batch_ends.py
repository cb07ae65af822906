"""Batches of services that lose ids, lines and lists: every request ends, and so does every run."""

from __future__ import annotations

import json

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main

from .conftest import KEY, states
from .test_batch import answer, finish, lines


def counted(seer, completed, failed=0, batch="batch_1"):
    """The service's count of its answers."""
    counts = {"total": 6 if completed else 0, "completed": completed, "failed": failed}
    seer.batches[batch]["request_counts"] = counts


def colleagues(number, first=0):
    """A page of the list with batches of somebody else."""
    data = [
        {"id": f"batch_{first + place}", "object": "batch", "status": "in_progress", "created_at": 1, "endpoint": "x",
         "completion_window": "24h", "input_file_id": "file-0", "metadata": {"who": "a colleague"}}
        for place in range(3)
    ]  # fmt: skip
    return {"object": "list", "data": data, "has_more": True}


@pytest.fixture
def lost_id(batches):
    """A batch whose id a crash lost."""
    assert batches("submit") == 0
    RequestLedger(batches.ledger).db.execute("UPDATE batch SET remote = NULL, state = 'creating'")
    return batches


def test_a_list_that_repeats_itself_ends_and_the_batch_that_was_not_found_is_named(seer, lost_id, capsys):
    seer.pages = colleagues
    assert lost_id("collect") == 0
    (name,) = RequestLedger(lost_id.ledger).db.execute("SELECT name FROM batch").fetchone()
    assert f"batch {name}: {seer.url}: the service does not know it, whose list" in capsys.readouterr().out
    assert len(seer.paths) < 6
    assert len(RequestLedger(lost_id.ledger).perhaps_paid()) == 6


def test_a_list_without_end_ends(seer, lost_id, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.captions.collect._MOST_PAGES", 20)
    seer.pages = lambda number: colleagues(number, first=3 * number)
    assert lost_id("collect") == 0
    assert "and the list has no end" in capsys.readouterr().out
    assert len(RequestLedger(lost_id.ledger).perhaps_paid()) == 6


def test_a_batch_is_found_on_any_page_in_any_order_also_without_its_name(seer, lost_id):
    finish(seer, "batch_1", output=[answer(seer, request) for request in lines(seer)])
    ours = {**seer.batches["batch_1"], "metadata": {}}
    pages = [colleagues(0, first=10), {"object": "list", "data": [{**ours, "id": "batch_1"}], "has_more": False}]
    seer.pages = lambda number: pages[number]
    assert lost_id("collect") == 0
    assert states(lost_id.ledger) == {"accepted": 6}


def test_one_batch_that_cannot_be_collected_does_not_stop_the_others(seer, batches, capsys):
    assert batches("submit", "--requests-per-file", "2") == 0
    for number in range(3):
        asked = lines(seer, number)
        finish(seer, f"batch_{number + 1}", output=[answer(seer, request) for request in asked])
    seer.odd["/v1/batches/batch_1"] = b"<html>"
    assert batches("collect") == 2
    assert "1 batches could not be collected now; batch batch_1: " in capsys.readouterr().err
    assert states(batches.ledger) == {"accepted": 4, "sent": 2}
    seer.odd.clear()
    assert batches("collect") == 0
    assert states(batches.ledger) == {"accepted": 6}


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_id_of_a_file_is_none(seer, batches, empty):
    assert batches("submit") == 0
    finish(seer, "batch_1", output=[answer(seer, request) for request in lines(seer)])
    seer.batches["batch_1"]["error_file_id"] = empty
    assert batches("collect") == 0
    assert states(batches.ledger) == {"accepted": 6}


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize("answer_", [b'{"id": "", "object": "file"}', b'{"object": "file"}', b'{"id": null}'])
def test_a_file_or_a_batch_without_an_id_is_one_line_and_nothing_is_forgotten(seer, batches, capsys, path, answer_):
    seer.odd[path] = answer_
    capsys.readouterr()
    assert batches("submit") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert states(batches.ledger) == ({"planned": 6} if path == "/v1/files" else {"sent": 6})


def test_an_error_in_a_200_creates_no_batch(seer, batches, capsys):
    seer.odd["/v1/batches"] = b'{"error": {"message": "too many batches", "code": 429}}'
    assert batches("submit") == 2
    assert "too many batches" in capsys.readouterr().err
    assert states(batches.ledger) == {"planned": 6}


@pytest.mark.parametrize(
    ("status", "counts", "silent"),
    [
        ("completed", (6, 0), "sent"),
        ("completed", (4, 2), "planned"),
        ("completed", (4, 0), "sent"),
        ("completed", (0, 0), "sent"),
        ("completed", None, "sent"),
        ("succeeded", (6, 0), "sent"),
        ("expired", (4, 0), "planned"),
        ("expired", (6, 0), "sent"),
        ("expired", None, "planned"),
        ("canceled", (4, 0), "planned"),
        ("cancelled", (5, 0), "sent"),
    ],
)
def test_requests_without_a_line_are_perhaps_paid_if_the_service_counts_them(seer, batches, status, counts, silent):
    assert batches("submit") == 0
    answers = [answer(seer, request) for request in lines(seer)[:4]]
    finish(seer, "batch_1", status=status, output=[*answers, *answers[:2]])  # some of them twice
    if counts:
        counted(seer, *counts)
    assert batches("collect") == 0
    assert states(batches.ledger) == {"accepted": 4, silent: 2}
    assert len(RequestLedger(batches.ledger).perhaps_paid()) == (2 if silent == "sent" else 0)
    assert batches("collect") == 0  # it has ended
    assert batches("submit") == 0
    assert seer.created == (2 if silent == "planned" else 1)


def test_each_line_of_a_batch_is_taken_for_what_it_is(seer, batches, capsys):
    """An error in a 200, no id, an empty id, a status in words, a wrong key: the rest is perhaps paid."""
    assert batches("submit") == 0
    asked = lines(seer)
    broken = {"custom_id": asked[0]["custom_id"], "response": {"status_code": 200, "body": {"error": {"code": 500}}}}
    key = {"custom_id": asked[1]["custom_id"], "response": {"status_code": 401, "body": {"error": "bad key"}}}
    worded = answer(seer, asked[2])
    worded["response"]["status_code"] = "200"
    nameless = [{**answer(seer, asked[3]), "custom_id": ""}, {"response": answer(seer, asked[4])["response"]}]
    finish(seer, "batch_1", output=[broken, key, worded, *nameless, answer(seer, asked[5])])
    counted(seer, 6)
    assert batches("collect") == 0
    out = capsys.readouterr().out
    assert "not in this ledger: 2" in out
    assert "perhaps paid, without an answer: 2" in out
    assert states(batches.ledger) == {"accepted": 2, "planned": 2, "sent": 2}


def test_a_batch_that_runs_for_more_than_a_week_is_perhaps_paid_and_taken_when_it_ends(seer, batches, capsys):
    assert batches("submit") == 0
    seer.batches["batch_1"]["status"] = "a word of its own"
    assert batches("collect") == 0
    assert RequestLedger(batches.ledger).perhaps_paid() == []
    RequestLedger(batches.ledger).db.execute("UPDATE batch SET created_at = created_at - 8 * 86400")
    assert batches("collect") == 0
    assert "a word of its own for more than a week" in capsys.readouterr().out
    assert len(RequestLedger(batches.ledger).perhaps_paid()) == 6
    finish(seer, "batch_1", output=[answer(seer, request) for request in lines(seer)])
    assert batches("collect") == 0
    assert states(batches.ledger) == {"accepted": 6}
    assert main(["captions", "status", batches.ledger]) == 0


def test_a_note_of_the_service_is_kept_without_the_key(seer, batches, capsys):
    assert batches("submit") == 0
    seer.batches["batch_1"]["errors"] = {"data": [{"message": f"the key {KEY} may not"}]}
    finish(seer, "batch_1", status="failed")
    assert batches("collect") == 0
    assert KEY not in capsys.readouterr().out
    notes = RequestLedger(batches.ledger).db.execute("SELECT note FROM batch").fetchall()
    assert "the key [hidden] may not" in json.dumps([tuple(row) for row in notes])
