"""A request that fails, an image that nobody can describe or read: each is set aside, and the others are asked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main
from data_prep.shards import Dataset

from .conftest import Reply, build_backwards, completion, good, states

SOON = {"retry-after-ms": "1"}


def poisoned(reply, images=1):
    """Behaviour of a service that replies so about the first images that it sees."""
    seen: list[str] = []

    def behave(asked):
        if asked.image not in seen:
            seen.append(asked.image)
        return reply if asked.image in seen[:images] else good(asked)

    return behave


FAULTS = {
    "500": (Reply(500, b'{"error": {"message": "cannot take this image"}}', SOON), "rejected:failed"),
    "503": (Reply(503, b"busy", SOON), "rejected:failed"),
    "an error in a 200": (Reply(200, b'{"error": {"code": 500, "message": "oops"}}', SOON), "rejected:failed"),
    "400": (Reply(400, b'{"error": {"message": "bad image"}}'), "rejected:declined"),
    "403": (Reply(403, b'{"error": {"code": 403, "message": "flagged"}}'), "rejected:declined"),
    "404": (Reply(404, b'{"error": {"message": "no such image"}}'), "rejected:declined"),
    "too large": (
        Reply(429, b'{"error": {"message": "Request too large", "code": "rate_limit_exceeded"}}'),
        "rejected:declined",
    ),
    "413": (Reply(413, b"<html>too large</html>"), "rejected:declined"),
    "a page in a 200": (Reply(200, b"<html>hello</html>", SOON), "rejected:failed"),
    "no JSON": (Reply(200, b'{"choices": [{"message": {"conte'), "rejected:malformed"),
    "hangs up": (Reply(drop=True), "sent"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_image_that_the_service_fails_at_is_set_aside_and_all_others_are_described(
    seer, planned, run, ledger, fault, capsys
):
    reply, state = FAULTS[fault]
    total = planned(12)
    seer.behave = poisoned(reply)
    assert run("--tries", "3") == 0
    assert states(ledger) == {"accepted": total - 3, state: 3}
    asked = len(seer.asked)
    assert run() == 0
    assert len(seer.asked) == asked
    capsys.readouterr()
    assert main(["captions", "status", ledger]) == 0
    out = capsys.readouterr().out
    if state in ("rejected:failed", "rejected:declined"):
        assert f"3 {state[9:]}, status {500 if 'a 200' in fault else reply.status}: " in out
        assert RequestLedger(ledger).spent() == 0
        seer.behave = good
        assert run("--resend", state[9:]) == 0
        assert states(ledger) == {"accepted": total}


@pytest.mark.parametrize("fault", ["500", "403", "hangs up"])
def test_many_images_that_the_service_fails_at_stop_no_run(seer, planned, run, ledger, fault, monkeypatch):
    """More than would stop a run if they came one after another."""
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.05)
    reply, state = FAULTS[fault]
    count = 60
    planned(count, languages=["en"])
    seer.behave = lambda asked: reply if int(asked.image, 16) % 4 == 0 else good(asked)
    assert run("--tries", "2") == 0
    found = states(ledger)
    # Those that nobody was answered after may be the service's fault, for all that is known.
    assert found[state] + found.get("planned", 0) + found["accepted"] == count
    assert found[state] > 6
    assert found.get("planned", 0) <= 3


def test_the_order_is_another_one_in_each_run_and_no_image_is_asked_about_many_times_in_a_row(seer, planned, run):
    planned(12)
    assert run("--limit", "18") == 0
    assert run("--limit", "18") == 0
    images = [asked.image for asked in seer.asked]
    assert len(set(images[:18])) > 6
    assert [image for image in images[:18] if image in images[18:]] != images[18:]


def test_a_service_that_fails_at_everything_stops_the_run_and_nothing_is_set_aside(
    seer, planned, run, ledger, capsys, monkeypatch
):
    total = planned(15, languages=["en"])
    seer.behave = lambda asked: good(asked) if asked.number < 5 else Reply(500, b"out of order", SOON)
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.01)
    assert run("--concurrency", "1") == 2
    assert "failed, 9 times in a row without an answer (status 500: out of order)" in capsys.readouterr().err
    assert states(ledger) == {"accepted": 5, "planned": total - 5}
    seer.behave = good
    assert run() == 0
    assert states(ledger) == {"accepted": total}


@pytest.mark.parametrize("answered", [0, 30])
@pytest.mark.parametrize("status", [403, 404, 400])
def test_what_is_declined_to_all_is_the_services_fault_and_planned_again(
    seer, planned, run, ledger, capsys, answered, status
):
    planned(80, languages=["en"])
    declined = Reply(status, b'{"error": {"message": "Project is blocked"}}')
    seer.behave = lambda asked: good(asked) if asked.number < answered else declined
    assert run("--concurrency", "1") == 2  # or an answer that comes late would speak for what was declined before it
    error = capsys.readouterr().err
    assert "Project is blocked" in error
    assert {403: "does not let the API key", 404: "knows no such model", 400: "declines every"}[status] in error
    assert len(seer.asked) < answered + 25
    assert set(states(ledger)) == {"accepted", "planned"} if answered else {"planned"}


def test_a_service_that_sends_pages_to_everybody_is_not_asked_a_thousand_times(
    seer, planned, run, ledger, capsys, monkeypatch
):
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.01)
    planned(40, languages=["en"])
    seer.behave = lambda asked: Reply(200, b"<html>Please log in</html>")
    assert run() == 2
    assert "9 times in a row without an answer (status 500: <html>Please log in</html>)" in capsys.readouterr().err
    assert len(seer.asked) < 20
    assert states(ledger) == {"planned": 40}


def test_a_service_that_sends_answers_of_another_kind_is_not_asked_a_thousand_times(seer, planned, run, capsys):
    planned(40, languages=["en"])
    seer.behave = lambda asked: Reply(200, b'{"object": "chat.completion", "id": "x"}')
    assert run() == 2
    assert "no answer of a chat completion" in capsys.readouterr().err
    assert len(seer.asked) < 20


@pytest.mark.parametrize("accepted", [0, 5])
def test_answers_that_are_all_no_captions_stop_the_run_before_all_is_spent(
    seer, planned, run, ledger, capsys, monkeypatch, accepted
):
    """A reasoning model that never gets to its answer, a service with a `finish_reason` of its own."""
    monkeypatch.setattr("data_prep.captions.run._REJECTED", 20)
    planned(60, languages=["en"])
    ends = json.dumps(completion("", finish="length")).encode()
    seer.behave = lambda asked: good(asked) if asked.number < accepted else Reply(200, ends)
    assert run("--concurrency", "1") == 2
    assert "20 answers in a row are no captions (truncated 20), and all are paid" in capsys.readouterr().err
    assert len(seer.asked) == accepted + 20
    seer.behave = good
    assert run() == 0
    assert states(ledger) == {"accepted": 40, "rejected:truncated": 20}


def test_a_request_that_fails_in_two_runs_is_set_aside_though_nobody_else_is_asked(seer, planned, run, ledger, capsys):
    planned(1, languages=["en"])
    seer.behave = lambda asked: Reply(500, b"no", SOON)
    assert run("--tries", "2") == 2
    assert "answered nothing (status 500: no)" in capsys.readouterr().err
    assert states(ledger) == {"planned": 1}
    assert run("--tries", "2") == 0
    assert states(ledger) == {"rejected:failed": 1}


def test_a_connection_that_nobody_has_is_no_requests_fault(seer, planned, run, ledger, monkeypatch):
    """Answers before and none after: nothing is set aside for want of a connection."""
    planned(3, languages=["en"])
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.01)

    def behave(asked):
        seer.shutdown()  # first: a socket that is waited on listens on after its closing
        seer.server_close()
        return Reply(body=good(asked).body, headers={"Connection": "close"})

    seer.behave = behave
    run("--concurrency", "1", "--tries", "2")
    assert states(ledger) == {"accepted": 1, "planned": 2}


@pytest.fixture
def damaged(tmp_path):
    """Changes a byte of an image, of the sample at this place."""

    def damage(number):
        dataset = Dataset.open(tmp_path / "images")
        row = dataset.row(number)
        path = Path(dataset.directory / row.shard)
        content = bytearray(path.read_bytes())
        content[row.members["png"][0] + 40] ^= 0xFF
        path.write_bytes(content)

    return damage


def test_an_image_that_cannot_be_read_holds_nobody_up(seer, planned, run, ledger, damaged, tmp_path, capsys):
    total = planned(6)
    damaged(2)
    prices = ("--price-in", "1", "--price-out", "10")
    assert run("--dry-run", *prices) == 0
    assert run(*prices) == 2
    out, error = capsys.readouterr()
    assert f"not sent and stay planned, as their images cannot be used: 3; {ledger}.run-dropped.jsonl lists them" in out
    assert "sample 'key-2' is damaged" in error
    assert states(ledger) == {"accepted": total - 3, "planned": 3}
    assert main(["captions", "batch", "submit", ledger, "--url", seer.url]) == 2
    error = capsys.readouterr().err
    assert "0 requests were sent in 0 batches, 3 stay planned" in error
    assert f"{ledger}.batch-dropped.jsonl lists them" in error
    for command in ("run", "batch"):
        listed = Path(f"{ledger}.{command}-dropped.jsonl").read_text().splitlines()
        assert [json.loads(line)["where"] for line in listed] == [f"image 2 of {(tmp_path / 'images').resolve()}"]


def test_a_plan_leaves_out_what_cannot_be_read_and_says_so(make_images, ledger, damaged, capsys):
    shards = str(make_images(6))
    damaged(4)
    plan = ["captions", "plan", ledger, shards, "--model", "m", "--languages", "en"]
    assert main(plan) == 0
    out = capsys.readouterr().out
    assert "5 requests planned" in out
    assert "1 images cannot be read and are left out" in out
    assert "'key-4'" in out
    damaged(4)  # which mends it
    assert main(plan) == 0
    assert "1 requests planned, 5 were in" in capsys.readouterr().out


def test_all_images_that_a_plan_leaves_out_are_listed_in_a_file(make_images, ledger, damaged, capsys):
    shards = make_images(26)
    for number in range(23):
        damaged(number)
    plan = ["captions", "plan", ledger, str(shards), "--model", "m", "--languages", "en"]
    assert main(plan) == 0
    listed = Path(f"{ledger}.plan-dropped.jsonl")
    assert f"23 images cannot be read and are left out; {listed} lists them" in capsys.readouterr().out
    lines = list(map(json.loads, listed.read_text().splitlines()))
    assert [line["where"] for line in lines] == [f"image {number} of {shards}" for number in range(23)]
    assert all("is damaged" in line["reason"] for line in lines)
    for number in range(23):
        damaged(number)  # which mends them
    assert main(plan) == 0
    assert not listed.exists()


def test_unpriced_attempts_about_an_image_that_is_gone_stop_no_run(seer, planned, run, ledger, damaged):
    planned(3, languages=["en"])
    seer.behave = lambda asked: Reply(drop=True) if asked.number == 0 else good(asked)
    assert run("--limit", "2") == 0
    for number in range(3):
        damaged(number)
    assert run("--price-in", "1", "--price-out", "10") == 2
    ledger_ = RequestLedger(ledger)
    assert ledger_.db.execute("SELECT count(*) FROM attempt WHERE cost IS NULL").fetchone()[0] == 0
    assert ledger_.spent() > 0.0019


def test_the_kept_answer_of_a_declined_request_is_the_services_own(seer, planned, run, ledger):
    planned(2, languages=["en"])
    body = json.dumps({"error": {"message": "flagged"}}).encode()
    seer.behave = poisoned(Reply(403, body))
    assert run() == 0
    raw = RequestLedger(ledger).db.execute("SELECT raw FROM attempt WHERE status = 403").fetchone()[0]
    assert hashlib.sha256(raw).digest() == hashlib.sha256(body).digest()


UNKNOWN = {
    "OpenAI": (404, {"error": {"message": "The model `seer-2` does not exist", "code": "model_not_found"}}),
    "vLLM": (404, {"message": "The model `seer-2` does not exist.", "type": "NotFoundError", "code": 404}),
    "Ollama": (404, {"error": {"message": 'model "seer-2" not found, try pulling it first', "type": "api_error"}}),
    "OpenRouter": (400, {"error": {"message": "seer-2 is not a valid model ID", "code": 400}}),
    "in a 200": (200, {"error": {"message": "unknown model seer-2"}}),
}


@pytest.mark.parametrize("said", UNKNOWN)
def test_a_model_that_the_service_does_not_know_stops_its_own_requests_and_no_others(
    seer, planned, run, ledger, tmp_path, capsys, said
):
    total = planned(6, languages=["en"])
    shards = str(tmp_path / "images")
    assert main(["captions", "plan", ledger, shards, "--model", "seer-2", "--languages", "en"]) == 0
    status, error = UNKNOWN[said]
    refused = Reply(status, json.dumps(error).encode())
    seer.behave = lambda asked: refused if asked.body["model"] == "seer-2" else good(asked)
    assert run("--concurrency", "2") == 2
    shown = capsys.readouterr()
    assert f"accepted {total}" in shown.out
    assert "seer-2: " in shown.err
    assert "knows no such model" in shown.err
    assert "its requests stay planned" in shown.err
    assert states(ledger) == {"accepted": total, "planned": 6}
    assert sum(asked.body["model"] == "seer-2" for asked in seer.asked) <= 2
    assert run() == 2  # of no other model anything is left
    assert states(ledger) == {"accepted": total, "planned": 6}


def test_an_image_that_changed_is_left_out_of_the_export_and_listed_and_the_others_go_out(
    seer, planned, run, ledger, tmp_path, capsys
):
    planned(5, languages=["en", "de"])
    assert run() == 0
    images = tmp_path / "images"
    build_backwards(images)  # the one in the middle stays where it is
    out = tmp_path / "long"
    capsys.readouterr()
    assert main(["captions", "export", ledger, str(out)]) == 2
    shown = capsys.readouterr()
    assert f"{out}: 2 captions" in shown.out
    assert "4 images were left out" in shown.err
    assert str(out / "dropped.jsonl") in shown.err
    assert len(Dataset.open(out, verify=True)) == 1
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"image {number} of {images}" for number in (0, 1, 3, 4)]
    assert all("is not the one that was planned" in line["reason"] and line["excerpt"] for line in lines)
    assert states(ledger) == {"accepted": 10}


def test_without_any_image_nothing_is_exported_and_the_first_reason_is_said(planned, run, ledger, tmp_path, capsys):
    planned(3, languages=["en"])
    assert run() == 0
    shutil.rmtree(tmp_path / "images")
    assert main(["captions", "export", ledger, str(tmp_path / "long")]) == 2
    assert "none of 3 images can be used, the first: " in capsys.readouterr().err
    assert not (tmp_path / "long").exists()
