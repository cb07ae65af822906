"""A service that never ends its answers, or sends something else: each call ends, and the ledger says as what."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import sqlite3

import pytest
from data_prep.captions import limited
from data_prep.captions.ledger import RequestLedger
from data_prep.cli import main

from .conftest import Reply, SeerService, completion, good, states

HEAD = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\n"
CHUNK = b"%x\r\n%s\r\n" % (50_000, b" " * 50_000)


def dripping_body(status: int = 200):
    whole = json.dumps(completion("An answer.")).encode().ljust(400)
    yield HEAD % status + b"Content-Length: 400\r\n\r\n"
    yield from (whole[place : place + 1] for place in range(400))


def dripping_header():
    yield HEAD % 200
    yield from (b"X-Slow: %d\r\n" % number for number in range(400))
    yield b"Content-Length: 2\r\n\r\n{}"


def endless(parts: int = 1000, status: int = 200):
    yield HEAD % status + b"Transfer-Encoding: chunked\r\n\r\n"
    yield from itertools.repeat(CHUNK, parts)
    yield b"0\r\n\r\n"


PACKED = gzip.compress(bytes(20_000_000))  # here, as it takes longer than an answer may


def bomb():
    yield HEAD % 200 + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(PACKED)
    yield PACKED


@pytest.mark.parametrize(
    ("wire", "pause", "note"),
    [
        (dripping_body, 0.05, "no whole answer within 0.6"),
        (lambda: dripping_body(500), 0.05, "no whole answer within 0.6"),
        (dripping_header, 0.05, "no whole answer within 0.6"),
        (endless, 0.0, "more than 100000 bytes"),
        (lambda: endless(status=500), 0.0, "more than 100000 bytes"),
        (bomb, 0.0, "more than 100000 bytes"),
    ],
    ids=["a byte at a time", "of an error", "of its headers", "without end", "an error without end", "packed"],
)
def test_an_answer_that_never_ends_is_ended_and_perhaps_paid(
    seer, planned, run, ledger, monkeypatch, capsys, wire, pause, note
):
    monkeypatch.setattr(limited, "MOST_BYTES", 100_000)
    planned(1, languages=["en"])
    seer.behave = lambda asked: Reply(wire=wire(), pause=pause)
    assert run("--timeout", "0.3", "--price-in", "1", "--price-out", "10") == 0
    assert states(ledger) == {"sent": 1}
    assert RequestLedger(ledger).spent() > 0
    assert len(seer.asked) == 1
    capsys.readouterr()
    assert main(["captions", "status", ledger]) == 0
    assert note in capsys.readouterr().out
    seer.behave = good
    assert run("--resend", "perhaps-paid") == 0
    assert states(ledger) == {"accepted": 1}


DEEP = b"[" * 50_000


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"choices": ' + DEEP,
        b"9" * 5000,
        b"NaN",
        b"\xff\xfe\x00\xd8",
        json.dumps(completion("half a character: \ud800 " * 30)).encode(),
        b'{"choices": [{"message": {"content": 5}}]}',
        b'{"choices": {"0": 1}}',
    ],
    ids=["deep", "deep inside", "digits", "nan", "no text", "half a character", "a number", "an object"],
)
def test_an_answer_that_nobody_can_read_is_rejected_once_and_stops_no_run(seer, planned, run, ledger, body):
    planned(2, languages=["en"])
    seer.behave = lambda asked: Reply(body=body)
    assert run() == 0
    assert states(ledger) == {"rejected:malformed": 2}
    assert run() == 0
    assert len(seer.asked) == 2


def test_counts_and_names_that_cannot_be_stored_are_none(seer, planned, run, ledger):
    planned(1, languages=["en"])

    def behave(asked):
        answer = json.loads(good(asked).body)
        answer |= {"model": "m\ud800", "system_fingerprint": ["f"]}
        answer["usage"] = {"prompt_tokens": 10**400, "completion_tokens": 2**64}
        return Reply(body=json.dumps(answer).encode())

    seer.behave = behave
    assert run("--price-in", "1", "--price-out", "10") == 0
    assert states(ledger) == {"accepted": 1}
    row = RequestLedger(ledger).db.execute("SELECT * FROM attempt").fetchone()
    assert (row["model"], row["fingerprint"], row["prompt_tokens"]) == ("m?", None, None)
    assert row["cost"] > 0  # the most that it may have cost


@pytest.mark.parametrize("body", [b'{"error": ' + DEEP, b'{"error": {"message": "\\ud800"}}', DEEP])
def test_an_error_that_nobody_can_read_is_noted(seer, planned, run, ledger, body):
    planned(1, languages=["en"])
    seer.behave = lambda asked: Reply(500, body, {"retry-after-ms": "1"}) if asked.number < 2 else good(asked)
    assert run() == 0
    assert states(ledger) == {"accepted": 1}
    assert len(seer.asked) == 3


@pytest.mark.parametrize("url", ["foo", "ftp://127.0.0.1/v1", "http://", "http://[", "http://a:x/v1", "http://a b/v1",
                                 "http://é/v1", "http://a\n/v1", "http://a:99999/v1", "//127.0.0.1/v1"])  # fmt: skip
def test_what_is_no_url_is_refused_before_anything_is_noted(seer, planned, ledger, capsys, url):
    total = planned(1)
    capsys.readouterr()
    assert main(["captions", "run", ledger, f"--url={url}"]) == 2
    error = capsys.readouterr().err
    assert "--url" in error
    assert error.count("\n") == 1
    assert states(ledger) == {"planned": total}


ODD = {
    "HTML": b"<html>hello</html>",
    "a list": b"[]",
    "null": b"null",
    "deep": DEEP,
    "other types": b'{"id": 5, "status": [], "data": [{"metadata": "x", "created_at": "now"}], "errors": "x"}',
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_a_service_without_batches_gives_one_line(seer, planned, ledger, capsys, odd, path):
    planned(1, languages=["en"])
    seer.odd[path] = ODD[odd]
    capsys.readouterr()
    assert main(["captions", "batch", "submit", ledger, "--url", seer.url]) == 2
    error = capsys.readouterr().err
    assert error.startswith("data-prep: ")
    assert error.count("\n") == 1
    assert states(ledger) == ({"planned": 1} if path == "/v1/files" else {"sent": 1})
    assert main(["captions", "batch", "collect", ledger, "--url", seer.url]) == (2 if path == "/v1/batches" else 0)
    assert capsys.readouterr().err.count("\n") == (path == "/v1/batches")


@pytest.fixture
def submitted(seer: SeerService, planned, ledger):
    """A batch that has ended, with this file of answers."""

    def submit(answers: bytes) -> None:
        planned(2, languages=["en"])
        assert main(["captions", "batch", "submit", ledger, "--url", seer.url]) == 0
        seer.files["answers"] = answers
        (batch,) = seer.batches.values()
        batch.update(status="completed", output_file_id="answers")

    return submit


def test_lines_of_a_batch_that_are_no_answers_are_counted(seer, submitted, ledger, capsys):
    lines = [DEEP, b'{"custom_id": []}', b'{"custom_id": "x", "response": 5}', b"\xff", b"NaN", b"9" * 5000, b"[]"]
    lines += [b'{"custom_id": "x", "response": {"status_code": "200", "body": 1}}']
    submitted(b"\n".join(lines))
    capsys.readouterr()
    assert main(["captions", "batch", "collect", ledger, "--url", seer.url]) == 0
    assert f"not in this ledger: {len(lines)}" in capsys.readouterr().out
    assert states(ledger) == {"sent": 2}  # which of them are answers to these, nobody can tell
    assert len(RequestLedger(ledger).perhaps_paid()) == 2


def test_answers_of_a_batch_without_end_are_one_line_and_stay_to_be_collected(
    seer, submitted, ledger, capsys, monkeypatch
):
    submitted(b" " * 300_000)
    monkeypatch.setattr(limited, "MOST_FILE", 100_000)
    capsys.readouterr()
    assert main(["captions", "batch", "collect", ledger, "--url", seer.url]) == 2
    error = capsys.readouterr().err
    assert "more than 100000 bytes" in error
    assert error.count("\n") == 1
    assert states(ledger) == {"sent": 2}


def test_a_commit_that_the_disk_refuses_leaves_nothing_open(ledger, planned):
    """Or the next request would be noted inside of it, leave, and be forgotten."""
    planned(1, languages=["en"])
    with contextlib.closing(RequestLedger(ledger)) as open_ledger:
        (pages,) = open_ledger.db.execute("PRAGMA page_count").fetchone()
        open_ledger.db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(sqlite3.OperationalError, match="full"), open_ledger.transaction() as db:
            db.execute("UPDATE request SET caption = ?", ("x" * 100_000,))
        assert not open_ledger.db.in_transaction
        with open_ledger.transaction() as db:
            db.execute("UPDATE request SET caption = 'y'")
    assert RequestLedger(ledger).db.execute("SELECT caption FROM request").fetchone()[0] == "y"
