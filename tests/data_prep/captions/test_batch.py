"""The Batch API against a service that keeps files and batches: joined by id, reconciled, never paid twice."""

from __future__ import annotations

import json

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main

from .conftest import build_backwards, caption, completion, states


def lines(seer, number=0):
    """The requests of an uploaded file."""
    return [json.loads(line) for line in seer.files[f"file-{number}"].splitlines()]


def answer(seer, request):
    """The line of an output file that answers a request."""
    asked = seer.note(request["body"])
    seer.computed[asked.image, asked.language] += 1
    body = completion(caption(asked.language, asked.image))
    return {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def finish(seer, batch, *, status="completed", output=(), errors=()):
    """End a batch, with the lines of its two files."""
    for field, content in (("output_file_id", output), ("error_file_id", errors)):
        name = f"file-{len(seer.files)}"
        seer.files[name] = b"".join(json.dumps(line).encode() + b"\n" for line in content)
        seer.batches[batch][field] = name if content else None
    seer.batches[batch]["status"] = status


def test_answers_in_any_order_find_their_requests(seer, batches, capsys):
    assert batches("submit") == 0
    assert states(batches.ledger) == {"sent": 6}
    assert lines(seer)[0]["url"] == "/v1/chat/completions"
    assert batches("collect") == 0
    assert "0 batches ended, 1 running" in capsys.readouterr().out
    finish(seer, "batch_1", output=[answer(seer, request) for request in lines(seer)[::-1]])
    prices = ("--price-in", "1", "--price-out", "10")
    assert batches("collect", *prices) == 0
    assert states(batches.ledger) == {"accepted": 6}
    assert RequestLedger(batches.ledger).spent() == pytest.approx(6 * 0.0019 / 2)
    for language, text, image in RequestLedger(batches.ledger).db.execute(
        "SELECT language, caption, image FROM request"
    ):
        expected = {caption(one.language, one.image) for one in seer.asked if one.language == language}
        assert text in expected, image
    assert batches("submit") == 0
    assert seer.created == 1


def test_files_stay_within_requests_and_bytes(seer, batches):
    assert batches("submit", "--requests-per-file", "4") == 0
    assert [len(lines(seer, number)) for number in range(2)] == [4, 2]
    size = max(len(line) for line in seer.files["file-0"].splitlines(keepends=True))
    ledger = RequestLedger(batches.ledger)
    ledger.db.execute("UPDATE request SET state = 'planned', batch = NULL")
    assert batches("submit", "--megabytes-per-file", str(2.5 * size / 1e6)) == 0
    later = [seer.files[f"file-{number}"] for number in range(2, len(seer.files))]
    assert all(len(data) <= 2.5 * size for data in later)
    assert sum(data.count(b"\n") for data in later) == 6
    assert batches.ledger + ".batch.jsonl" not in {str(path) for path in ledger.path.parent.iterdir()}


def test_what_an_expired_batch_did_not_answer_is_planned_again_and_only_that(seer, batches, capsys):
    assert batches("submit") == 0
    asked = lines(seer)
    expired = {"custom_id": asked[2]["custom_id"], "response": None, "error": {"code": "batch_expired", "message": "x"}}
    failed = {"custom_id": asked[3]["custom_id"], "response": {"status_code": 500, "body": {}}, "error": None}
    declined = {"custom_id": asked[4]["custom_id"], "response": {"status_code": 400, "body": {"error": "no"}}}
    stranger = {"custom_id": "0" * 32, "response": {"status_code": 200, "body": {}}, "error": None}
    first = answer(seer, asked[0])
    output = [first, answer(seer, asked[1]), first, stranger]
    finish(seer, "batch_1", status="expired", output=output, errors=[expired, failed, declined])
    assert batches("collect") == 0
    out = capsys.readouterr().out
    assert "not answered and planned again: 3" in out  # expired, failed, and the last, which has no line at all
    assert "not in this ledger: 1" in out
    assert states(batches.ledger) == {"accepted": 2, "planned": 3, "rejected:declined": 1}
    assert batches("submit") == 0
    again = lines(seer, max(int(name.split("-")[1]) for name in seer.files))
    assert {line["custom_id"] for line in again} == {asked[place]["custom_id"] for place in (2, 3, 5)}
    finish(seer, "batch_2", output=[answer(seer, request) for request in again])
    assert batches("collect") == 0
    assert states(batches.ledger) == {"accepted": 5, "rejected:declined": 1}
    assert max(seer.computed.values()) == 1


def test_a_batch_that_failed_validation_costs_nothing_and_says_why(seer, batches, capsys):
    assert batches("submit", "--price-in", "1", "--price-out", "1") == 0
    assert RequestLedger(batches.ledger).spent() > 0
    seer.batches["batch_1"]["errors"] = {"data": [{"message": "the model does not take images"}]}
    finish(seer, "batch_1", status="failed")
    assert batches("collect") == 0
    assert "failed: the model does not take images" in capsys.readouterr().out
    assert states(batches.ledger) == {"planned": 6}
    assert RequestLedger(batches.ledger).spent() == 0


def test_a_crash_before_the_batchs_id_is_known_is_mended_by_its_name(seer, batches):
    assert batches("submit") == 0
    RequestLedger(batches.ledger).db.execute("UPDATE batch SET remote = NULL, state = 'creating'")
    finish(seer, "batch_1", output=[answer(seer, request) for request in lines(seer)])
    assert batches("collect") == 0
    assert states(batches.ledger) == {"accepted": 6}


@pytest.mark.parametrize("known_by_id", [False, True])
def test_a_batch_that_the_service_does_not_know_is_perhaps_paid(seer, batches, capsys, known_by_id):
    assert batches("submit") == 0
    RequestLedger(batches.ledger).db.execute("UPDATE batch SET remote = NULL, state = 'creating'")
    assert RequestLedger(batches.ledger).perhaps_paid() == []
    seer.batches.clear()
    if known_by_id:
        RequestLedger(batches.ledger).db.execute("UPDATE batch SET remote = 'batch_1', state = 'open'")
    assert batches("collect") == 0
    assert "the service does not know it" in capsys.readouterr().out
    assert len(RequestLedger(batches.ledger).perhaps_paid()) == 6
    assert batches("submit") == 0
    assert seer.created == 1


def test_the_budget_holds_for_batches_too(seer, batches):
    prices = ("--price-in", "1", "--price-out", "10", "--image-tokens", "800", "--batch-factor", "1")
    assert batches("submit", *prices, "--budget", "0.035") == 0
    assert 0 < len(lines(seer)) < 6
    assert 0.02 < RequestLedger(batches.ledger).spent() <= 0.035


def test_a_batch_paid_without_prices_counts_at_a_batchs_price_once_there_are_some(seer, batches):
    assert batches("submit") == 0
    finish(seer, "batch_1", output=[answer(seer, request) for request in lines(seer)])
    assert batches("collect") == 0
    assert batches("submit", "--price-in", "1", "--price-out", "10", "--budget", "1") == 0
    assert RequestLedger(batches.ledger).spent() == pytest.approx(6 * 0.0019 / 2)


def test_an_image_that_is_another_one_by_now_goes_into_no_batch_and_stops_no_other(seer, batches, tmp_path, capsys):
    build_backwards(tmp_path / "images")  # of three, so that the one in the middle stays where it is
    assert batches("submit") == 2
    error = capsys.readouterr().err
    assert "2 requests were sent in 1 batches, 4 stay planned" in error
    assert "images: image 0 is not the one that was planned" in error
    assert len(lines(seer)) == 2
    assert states(batches.ledger) == {"planned": 4, "sent": 2}


def test_a_model_that_is_unknown_gets_no_batch_and_stops_no_other(seer, batches, tmp_path, capsys):
    plan = ["captions", "plan", batches.ledger, str(tmp_path / "images"), "--model", "seer-2", "--languages", "en"]
    assert main(plan) == 0
    seer.unknown = {"seer-1"}
    assert batches("submit", "--requests-per-file", "2") == 2
    error = capsys.readouterr().err
    assert "3 requests were sent in 2 batches, those of seer-1 stay planned: " in error
    assert "knows no such model" in error
    assert states(batches.ledger) == {"planned": 6, "sent": 3}
    assert len(seer.files) == 3  # after the first refusal nothing of that model is uploaded


def test_a_wrong_key_sends_nothing(seer, batches, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key-that-must-stay-secret")
    assert batches("submit") == 2
    error = capsys.readouterr().err
    assert "refuses the API key" in error
    assert "sk-wrong" not in error
    assert states(batches.ledger) == {"planned": 6}
