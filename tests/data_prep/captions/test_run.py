"""Runs against a real service on loopback: what it is asked, what is kept, and what stops it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections import Counter

import pytest
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main
from data_prep.shards import Dataset

from .conftest import KEY, LANGUAGES, Reply, build_backwards, caption, completion, good, states


def test_every_image_is_described_once_in_each_language_and_exported(seer, planned, run, ledger, tmp_path, capsys):
    planned(5, again=2)
    assert "5 different images (2 more occurred again)" in capsys.readouterr().out
    assert run() == 0
    assert states(ledger) == {"accepted": 15}
    assert len(seer.asked) == 15
    assert set(seer.computed.values()) == {1}
    body = seer.asked[0].body
    assert (body["model"], body["max_completion_tokens"]) == ("seer-1", 500)
    assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")

    assert run() == 0  # nothing left
    again = ["--model", "seer-1", "--languages", "en", "--max-tokens", "500"]
    assert main(["captions", "plan", ledger, str(tmp_path / "images"), *again]) == 0
    assert "0 requests planned, 5 were in" in capsys.readouterr().out
    assert len(seer.asked) == 15

    assert main(["captions", "export", ledger, str(tmp_path / "long")]) == 0
    dataset = Dataset.open(tmp_path / "long", verify=True)
    assert (dataset.kind, len(dataset)) == ("image-long", 5)
    source = Dataset.open(tmp_path / "images")
    for number in range(5):
        members = dataset.read(number)
        sample = json.loads(members["json"])
        assert members["png"] == source.read(number)["png"]
        assert sample["item"] == f"item-{number}"
        assert [text["language"] for text in sample["captions"]] == list(LANGUAGES)
        assert {text["origin"] for text in sample["captions"]} == {"synthetic:seer-1:v1"}
        assert {text["role"] for text in sample["captions"]} == {"long"}
        for made, text in zip(sample["synthesis"], sample["captions"], strict=True):
            assert made["fingerprint"] == "fp_7"
            assert made["served_model"] == "seer-1-2026-01-01"
            assert (made["prompt_tokens"], made["completion_tokens"]) == (900, 100)
            (prompt,) = [p for p, language in seer.languages.items() if language == text["language"]]
            assert made["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()


@pytest.mark.parametrize(
    ("reason", "reply"),
    [
        ("refusal", lambda text: completion(None, refusal="I can't help with that.")),
        ("refusal", lambda text: completion("I'm sorry, but I can't describe this image. " + text)),
        ("refusal", lambda text: completion(text, finish="content_filter")),
        ("truncated", lambda text: completion(text, finish="length")),
        ("language", lambda text: completion(caption("de", text))),
        ("language", lambda text: completion(text + " " + caption("fr", text, 120))),
        ("length", lambda text: completion("A red house.")),
        ("repetition", lambda text: completion("The small red house stands behind the tall trees. " * 8)),
        ("empty", lambda text: completion("  ")),
        ("malformed", lambda text: {"object": "chat.completion", "choices": []}),
    ],
)
def test_a_bad_answer_is_rejected_with_its_reason_kept_raw_and_not_bought_again(
    seer, planned, run, ledger, reason, reply
):
    planned(2, languages=["en"])
    seer.behave = lambda asked: Reply(body=json.dumps(reply(caption("en", asked.image))).encode())
    assert run() == 0
    assert states(ledger) == {f"rejected:{reason}": 2}
    assert run() == 0
    assert len(seer.asked) == 2
    raw = RequestLedger(ledger).db.execute("SELECT raw FROM attempt").fetchone()[0]
    assert json.loads(raw) == reply(caption("en", seer.asked[0].image))
    seer.behave = good
    assert run("--resend", reason) == 0
    assert states(ledger) == {"accepted": 2}


def test_truncated_json_is_paid_for_kept_and_rejected(seer, planned, run, ledger):
    planned(1, languages=["en"])
    seer.behave = lambda asked: Reply(body=good(asked).body[:200])
    assert run("--price-in", "1", "--price-out", "10") == 0
    assert states(ledger) == {"rejected:malformed": 1}
    assert RequestLedger(ledger).spent() > 0  # nobody counted: the most that it may have cost


def test_a_service_in_trouble_is_asked_again_until_it_answers_and_nothing_is_paid_twice(seer, planned, run, ledger):
    total = planned(4)
    trouble = {
        1: Reply(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.05"}),
        3: Reply(500, b"oops", {"retry-after-ms": "20"}),
        4: Reply(503, b"<html>busy</html>", {"retry-after-ms": "20"}),
        6: Reply(429, b'{"error": {"message": "slow down"}}', {"retry-after-ms": "30"}),
    }
    seer.behave = lambda asked: trouble.get(asked.number) or good(asked)
    assert run() == 0
    assert states(ledger) == {"accepted": total}
    assert len(seer.asked) == total + len(trouble)
    assert set(seer.computed.values()) == {1}
    found = RequestLedger(ledger).db.execute("SELECT status FROM attempt WHERE status <> 200").fetchall()
    assert Counter(row["status"] for row in found) == {429: 2, 500: 1, 503: 1}


def test_retry_after_holds_everybody_back(seer, planned, run):
    planned(4)
    limited = Reply(429, b"{}", {"Retry-After": "1.5"})
    seer.behave = lambda asked: limited if asked.number == 3 else Reply(body=good(asked).body, seconds=0.3)
    assert run() == 0
    later = [moment - seer.times[3] for moment in seer.times[4:]]
    assert len(later) == 9
    assert sum(gap < 1.5 for gap in later) <= 3  # what left together with it


def test_calls_at_a_time_grow_while_the_service_answers_and_stay_below_the_limit(seer, planned, run):
    planned(10)
    seer.behave = lambda asked: Reply(body=good(asked).body, seconds=0.05)
    assert run("--concurrency", "5") == 0
    assert 3 <= seer.most_under_way <= 5


def test_a_broken_connection_is_perhaps_paid_and_goes_out_again_only_by_name(seer, planned, run, ledger, capsys):
    total = planned(3)
    seer.behave = lambda asked: Reply(drop=True) if asked.number == 2 else good(asked)
    assert run() == 0
    assert states(ledger) == {"accepted": total - 1, "sent": 1}
    assert run() == 0
    assert len(seer.asked) == total
    capsys.readouterr()
    assert main(["captions", "status", ledger]) == 0
    out = capsys.readouterr().out
    assert "perhaps paid (or under way, if a run is): 1" in out
    assert "RemoteProtocolError" in out or "ReadError" in out
    assert run("--resend", "perhaps-paid") == 0
    assert states(ledger) == {"accepted": total}
    assert sorted(seer.computed.values()) == [1] * (total - 1) + [2]


def test_an_answer_that_takes_too_long_is_perhaps_paid(seer, planned, run, ledger):
    planned(1, languages=["en"])
    seer.behave = lambda asked: Reply(body=good(asked).body, seconds=0.5)
    assert run("--timeout", "0.2") == 0
    assert states(ledger) == {"sent": 1}


def test_a_service_that_is_not_there_costs_nothing_and_says_so(planned, ledger, monkeypatch, capsys):
    planned(1, languages=["en"])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.001)
    assert main(["captions", "run", ledger, "--url", "http://127.0.0.1:9/v1", "--tries", "3"]) == 2
    out, err = capsys.readouterr()
    assert "met too many failures and stay planned: 1" in out
    assert "http://127.0.0.1:9/v1 answered nothing (ConnectError" in err
    assert states(ledger) == {"planned": 1}
    assert RequestLedger(ledger).spent() == 0


def test_a_wrong_key_gives_one_message_no_retries_and_is_never_shown(seer, planned, run, ledger, monkeypatch, capsys):
    total = planned(4)
    wrong = "sk-wrong-key-that-must-stay-secret"
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    capsys.readouterr()
    assert run() == 2
    out, err = capsys.readouterr()
    assert "refuses the API key in OPENAI_API_KEY (status 401" in err
    assert err.count("\n") == 1
    assert len(seer.asked) == 1
    assert states(ledger) == {"planned": total}
    assert wrong not in out + err
    RequestLedger(ledger).db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for path in os.listdir(os.path.dirname(ledger)):
        if path.startswith("ledger"):
            with open(os.path.join(os.path.dirname(ledger), path), "rb") as file:
                assert wrong.encode() not in file.read()


@pytest.mark.parametrize("key", ["sk-secret\nOPENAI_ORG=secret", "sk-secret\u00e9", "sk-secret secret", "“sk-secret”"])
def test_what_cannot_be_a_key_is_refused_before_anything_is_sent_and_never_shown(
    seer, planned, run, ledger, monkeypatch, capsys, key
):
    total = planned(1)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert run() == 2
    out, err = capsys.readouterr()
    assert "the API key in OPENAI_API_KEY has" in err
    assert err.count("\n") == 1
    assert "secret" not in out + err
    assert not seer.asked
    assert states(ledger) == {"planned": total}
    assert not RequestLedger(ledger).db.execute("SELECT * FROM attempt").fetchall()


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, {"message": "The model `seer-1` does not exist", "code": "model_not_found"}, "knows no such model"),
        (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, "has no money left"),
        (403, {"message": "No", "type": "insufficient_quota"}, "has no money left"),
        (400, {"message": "API key not valid. Please pass a valid API key.", "code": 400}, "refuses the API key"),
        (402, {"message": "Insufficient credits"}, "has no money left"),
    ],
)
def test_what_no_retry_can_mend_stops_the_run_at_once(seer, planned, run, ledger, capsys, status, error, says):
    total = planned(4)
    seer.behave = lambda asked: Reply(status, json.dumps({"error": error}).encode())
    assert run() == 2
    assert says in capsys.readouterr().err
    assert len(seer.asked) == 1
    assert states(ledger) == {"planned": total}


def test_a_service_that_declines_everything_is_not_asked_a_thousand_times(seer, planned, run, ledger, capsys):
    planned(30)
    seer.behave = lambda asked: Reply(400, b'{"error": {"message": "max_completion_tokens is not supported"}}')
    assert run() == 2
    assert "declines every request (max_completion_tokens is not supported)" in capsys.readouterr().err
    assert len(seer.asked) < 20


def test_a_declined_request_is_rejected_and_the_others_go_on(seer, planned, run, ledger):
    total = planned(3)
    filtered = Reply(400, b'{"error": {"message": "content policy", "code": "content_policy_violation"}}')
    seer.behave = lambda asked: filtered if asked.number == 4 else good(asked)
    assert run() == 0
    assert states(ledger) == {"accepted": total - 1, "rejected:declined": 1}


def test_captions_that_nearly_repeat_another_images_are_rejected_all_but_the_first(seer, planned, run, ledger):
    planned(4, languages=["en"])
    texts = [caption("en", "its own"), *[caption("en", "the same")] * 3]
    seer.behave = lambda asked: Reply(body=json.dumps(completion(texts[asked.number])).encode())
    assert run() == 0
    assert states(ledger) == {"accepted": 2, "rejected:duplicate": 2}
    seer.behave = good  # other words this time, and judged by them
    assert run("--resend", "duplicate") == 0
    assert states(ledger) == {"accepted": 4}


def test_captions_of_one_image_may_be_alike_but_not_those_of_two(seer, planned, run, ledger, tmp_path):
    """Two models say the same of an image: both stay. What they say of another image in the same words goes."""
    planned(3, languages=["en"])
    said = ["the same", "its own", "the same"]
    images: list[str] = []

    def behave(asked):
        if asked.image not in images:
            images.append(asked.image)
        return Reply(body=json.dumps(completion(caption("en", said[images.index(asked.image)]))).encode())

    seer.behave = behave
    assert run() == 0
    assert states(ledger) == {"accepted": 2, "rejected:duplicate": 1}
    again = ["--model", "seer-2", "--languages", "en", "--max-tokens", "500"]
    assert main(["captions", "plan", ledger, str(tmp_path / "images"), *again]) == 0
    assert run() == 0
    assert states(ledger) == {"accepted": 4, "rejected:duplicate": 2}
    rows = RequestLedger(ledger).db.execute("SELECT image, state, count(*) AS n FROM request GROUP BY 1, 2").fetchall()
    assert sorted((row["state"], row["n"]) for row in rows) == [("accepted", 2), ("accepted", 2), ("rejected", 2)]


def test_an_image_that_is_another_one_by_now_is_not_sent_until_it_is_planned_again(
    seer, planned, run, ledger, tmp_path, capsys
):
    planned(3)
    images = tmp_path / "images"
    build_backwards(images)  # the one in the middle stays where it is
    assert run() == 2
    out, error = capsys.readouterr()
    assert re.search(rf"{images}: image [02] is not the one that was planned", error)
    assert "captions plan" in error
    assert "as their images cannot be used: 6" in out
    assert len(seer.asked) == 3
    assert states(ledger) == {"accepted": 3, "planned": 6}
    again = ["--model", "seer-1", "--languages", *LANGUAGES, "--max-tokens", "500"]
    assert main(["captions", "plan", ledger, str(images), *again]) == 0
    assert "0 requests planned, 9 were in" in capsys.readouterr().out
    assert run() == 0
    assert states(ledger) == {"accepted": 9}


def test_a_data_set_that_moved_is_found_again_by_planning_it_where_it_is(seer, planned, run, ledger, tmp_path):
    planned(3, languages=["en"])
    assert run() == 0
    moved = (tmp_path / "images").rename(tmp_path / "elsewhere")
    export = ["captions", "export", ledger, str(tmp_path / "long")]
    assert main(export) == 2
    # Known images are found again whether this plan draws them or not.
    again = ["--model", "seer-1", "--languages", "en", "--max-tokens", "500", "--images", "1"]
    assert main(["captions", "plan", ledger, str(moved), *again]) == 0
    assert main(export) == 0
    items = {json.loads(Dataset.open(tmp_path / "long").read(number)["json"])["item"] for number in range(3)}
    assert items == {"item-0", "item-1", "item-2"}


def test_a_fault_with_one_answer_leaves_the_others_under_way_to_come_back(seer, planned, run, ledger, monkeypatch):
    planned(10)
    seconds = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.1}  # the fourth fails while those behind it are out
    seer.behave = lambda asked: Reply(body=good(asked).body, seconds=seconds.get(asked.number, 0.5))
    received, calls = RequestLedger.received, []

    def breaks_once(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("a fault of ours")
        received(*arguments, **named)

    monkeypatch.setattr(RequestLedger, "received", breaks_once)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run()
    assert len(seer.asked) > 5
    assert states(ledger) == {"accepted": len(seer.asked) - 1, "sent": 1, "planned": 30 - len(seer.asked)}


@pytest.mark.parametrize(
    "options",
    [
        ["--concurrency", "0"],
        ["--requests-per-minute", "0"],
        ["--tokens-per-minute", "-1"],
        ["--tries", "0"],
        ["--limit", "-1"],
        ["--timeout", "0"],
        ["--price-in", "-1", "--price-out", "1"],
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_sent(seer, planned, run, capsys, options):
    planned(1)
    assert run(*options) == 2
    assert ": expected" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not seer.asked


def test_two_runs_at_once_are_refused(seer, planned, run, ledger, capsys):
    planned(1)
    with RequestLedger(ledger).exclusive():
        assert run() == 2
    assert "is in use by another run" in capsys.readouterr().err
    assert not seer.asked


def test_a_prompt_that_changed_under_its_version_is_refused(make_images, ledger, tmp_path, capsys):
    shards = str(make_images(1))
    folder = tmp_path / "prompts" / "mine"
    folder.mkdir(parents=True)
    command = ["captions", "plan", ledger, shards, "--model", "m", "--languages", "en"]
    command += ["--prompt-version", "mine", "--prompts", str(tmp_path / "prompts")]
    (folder / "en.txt").write_text("Describe.")
    assert main(command) == 0
    (folder / "en.txt").write_text("Describe it.")
    assert main(command) == 2
    assert "give the new text a new version" in capsys.readouterr().err


def test_a_gateway_that_lost_patience_may_have_been_paid(seer, planned, run, ledger):
    planned(1, languages=["en"])
    seer.behave = lambda asked: Reply(504, b"<html>gateway timeout</html>")
    assert run() == 0
    assert states(ledger) == {"sent": 1}
    assert len(seer.asked) == 1


def test_a_disk_that_refuses_stops_the_run_with_one_message(seer, planned, run, ledger, capsys, monkeypatch):
    planned(2)

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(RequestLedger, "sent", full)
    assert run() == 2
    error = capsys.readouterr().err
    assert "cannot be written (database or disk is full)" in error
    assert not seer.asked  # nothing leaves that is not written down first


@pytest.mark.parametrize("command", ["run", "status", "export"])
def test_a_ledger_that_was_cut_off_to_nothing_is_no_ledger(seer, planned, run, ledger, capsys, tmp_path, command):
    planned(2)
    for path in tmp_path.glob("ledger.sqlite*"):  # with its journal, from which SQLite would restore it
        path.unlink()
    (tmp_path / "ledger.sqlite").touch()
    (tmp_path / "ledger.sqlite-wal").write_bytes(b"what was committed last")
    out = [str(tmp_path / "out")] if command == "export" else []
    assert main(["captions", command, ledger, *out, *(["--url", seer.url] if command == "run" else [])]) == 2
    assert "ledger.sqlite: is empty; restore it from a copy" in capsys.readouterr().err
    assert (tmp_path / "ledger.sqlite-wal").read_bytes() == b"what was committed last"
    assert not seer.asked
