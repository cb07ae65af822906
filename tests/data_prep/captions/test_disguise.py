"""Errors in disguise: a 200 without an answer, a 400 that means a wrong key, limits inside of a body."""

from __future__ import annotations

import json
import time

import pytest
from data_prep.captions.faults import disguised, error_message, hints_inside, limited, stopping
from data_prep.captions.ledger import RequestLedger

from .conftest import Reply, caption, completion, good, states

CHAT = "/v1/chat/completions"
LIMITS = [
    {"error": {"message": "Rate limit exceeded: free-models-per-min", "code": 429}, "user_id": "u"},
    {"error": {"message": "Provider returned error", "code": "429"}},
    {"error": {"message": "slow down", "type": "rate_limit_error"}},
    {"error": "429 Too Many Requests"},
    {"object": "error", "message": "Too many requests", "code": 429},
    {"code": "Throttling.RateQuota", "message": "Requests throttled", "request_id": "r"},
    {"id": "gen-1", "choices": [], "error": {"status": "RESOURCE_EXHAUSTED", "message": "x"}},
    {"choices": None, "detail": "rate limit reached"},
    [{"error": {"code": 429, "message": "Resource has been exhausted"}}],
    {"error_code": 18, "error_msg": "Open api qps request limit reached"},
    {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}, "choices": None},
    {"code": 1302, "msg": "您的账户已达到速率限制"},
    {"success": False, "code": 429},
    {"choices": [{"error": {"code": 429, "message": "busy"}, "finish_reason": "error", "message": {"content": ""}}]},
]


@pytest.mark.parametrize("body", LIMITS)
def test_a_limit_in_a_200_is_a_429_and_asked_again(seer, planned, run, ledger, body):
    total = planned(1)
    raw = json.dumps(body).encode()
    assert disguised(CHAT, raw) == 429
    seer.behave = lambda asked: Reply(200, raw, {"retry-after-ms": "5"}) if asked.number in (0, 2) else good(asked)
    assert run() == 0
    assert states(ledger) == {"accepted": total}
    statuses = RequestLedger(ledger).db.execute("SELECT status, cost FROM attempt WHERE raw IS NULL").fetchall()
    assert [tuple(row) for row in statuses] == [(429, 0.0)] * 2


def test_a_limit_in_every_200_ends_the_run_with_the_services_message(seer, planned, run, ledger, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.01)
    planned(20, languages=["en"])
    seer.behave = lambda asked: good(asked) if asked.number < 3 else Reply(200, json.dumps(LIMITS[0]).encode())
    assert run() == 2
    error = capsys.readouterr().err
    assert "asks all to wait, 9 times in a row without an answer (status 429: Rate limit exceeded: free" in error
    assert states(ledger) == {"accepted": 3, "planned": 17}


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}, "refuses the API key"),
        (200, {"error": {"message": "x", "code": 401}}, "refuses the API key"),
        (
            200,
            {"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]},
            "refuses the API key",
        ),
        (200, {"code": "Arrearage", "message": "Access denied, overdue"}, "has no money left"),
        (200, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}, "has no money left"),
        (400, {"error": {"message": "API key not valid. Please pass one.", "code": 400}}, "refuses the API key"),
        (403, {"error": {"message": "x", "code": "insufficient_quota"}}, "has no money left"),
        (500, {"error": {"message": "x", "type": "authentication_error"}}, "refuses the API key"),
        (400, {"error": {"message": "x", "code": "ModelNotFound"}}, "knows no such model"),
    ],
)
def test_what_holds_for_all_stops_the_run_whatever_it_comes_as(seer, planned, run, ledger, capsys, status, body, says):
    total = planned(4)
    seer.behave = lambda asked: Reply(status, json.dumps(body).encode())
    assert run() == 2
    assert says in capsys.readouterr().err
    assert len(seer.asked) == 1
    assert states(ledger) == {"planned": total}


@pytest.mark.parametrize(
    ("raw", "status", "message"),
    [
        (b'data: {"error": {"message": "busy", "code": 503}}\n\n', 503, "busy"),
        (b'event: error\ndata: {"error": {"message": "slow", "code": 429}}\n\n', 429, "slow"),
        (b'{"fault": {"faultstring": "Spike arrest", "detail": {"errorcode": "x"}}}', 500, "Spike arrest"),
        (b'{"errorMessage": "Task timed out"}', 500, "Task timed out"),
        (b'{"status": "error", "status_code": 503}', 503, "no message"),
        (b'{"data": {"error": {"message": "overloaded", "code": 503}}}', 503, "overloaded"),
        (b'{"response": {"status": "failed", "error": {"code": "server_error", "message": "boom"}}}', 500, "boom"),
        (b'"Internal server error"', 500, '"Internal server error"'),
        (b"<!DOCTYPE html><title>502 Bad Gateway</title>", 500, "<!DOCTYPE html><title>502 Bad Gateway</title>"),
        (b"upstream connect error or disconnect/reset", 500, "upstream connect error or disconnect/reset"),
    ],
)
def test_an_event_or_another_form_of_error_in_a_200_is_none_of_an_answer(raw, status, message):
    assert disguised(CHAT, raw) == status
    assert error_message(raw) == message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'{"choices": [{"message": {"content": "Half an ans',
        b'{"model": "m", "message": {"role": "assistant", "content": "of another API"}, "done": true}',
        json.dumps({**completion("A dog."), "error": None}).encode(),
        json.dumps({**completion("A dog."), "prompt_filter_results": [{"error": {"code": "x"}}]}).encode(),
    ],
)
def test_what_may_be_paid_is_no_error_in_disguise(raw):
    assert disguised(CHAT, raw) is None


def test_an_answer_with_an_error_beside_it_is_unfinished(seer, planned, run, ledger):
    planned(1, languages=["en"])
    text = caption("en", "x")
    body = {**completion(text), "error": {"message": "the provider broke off", "code": 502}}
    seer.behave = lambda asked: Reply(200, json.dumps(body).encode())
    assert run() == 0
    assert states(ledger) == {"rejected:unfinished": 1}


@pytest.mark.parametrize("status", [400, 403, 503])
def test_a_limit_under_another_status_is_a_limit(seer, planned, run, ledger, status):
    total = planned(2)
    body = b'{"error": {"message": "x", "code": "rate_limit_exceeded"}}'
    seer.behave = lambda asked: Reply(status, body, {"retry-after-ms": "5"}) if asked.number == 1 else good(asked)
    assert run() == 0
    assert states(ledger) == {"accepted": total}
    assert limited(status, body)


def test_a_reset_inside_of_the_body_is_waited_for(seer, planned, run):
    planned(2)

    def behave(asked):
        if asked.number != 2:
            return good(asked)
        headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time() * 1000) + 900)}
        error = {"message": "x", "code": 429, "metadata": {"headers": headers}}
        return Reply(200, json.dumps({"error": error}).encode())

    seer.behave = behave
    assert run("--concurrency", "1") == 0
    assert 0.8 < seer.times[3] - seer.times[2] < 30


@pytest.mark.parametrize(
    "body",
    [
        completion(caption("en", "x")),
        {**completion(caption("en", "x")), "error": {}},
        {**completion(caption("en", "x")), "error": None, "code": 200, "message": "ok"},
        completion(None),
        {"object": "chat.completion", "choices": []},
        {"choices": [{"message": {"content": caption("en", "x")}, "error": {"code": 502}, "finish_reason": "error"}]},
        [],
        "error",
        None,
    ],
)
def test_an_answer_is_no_error(body):
    assert disguised(CHAT, json.dumps(body).encode()) is None


@pytest.mark.parametrize("body", [{"id": "batch_1", "errors": {"data": []}}, {"object": "list", "data": []}])
def test_a_batch_or_a_list_is_no_error(body):
    assert disguised("/v1/batches", json.dumps(body).encode()) is None


def test_a_caption_about_keys_and_limits_stops_nothing():
    raw = json.dumps(completion("A sign says: invalid API key, rate limit, insufficient balance.")).encode()
    assert disguised(CHAT, raw) is None
    assert stopping(500, b'{"error": {"message": "the image of a key could not be loaded"}}') is None


@pytest.mark.parametrize("raw", [b"", b"[" * 50_000, b"\xff", b"[]", b"[[]]", b'{"error": []}', b'{"choices": [5]}'])
def test_no_body_of_an_error_is_too_odd(raw):
    for path in (CHAT, "/v1/files"):
        disguised(path, raw)
    assert error_message(raw)
    assert hints_inside(raw) == {}
    assert stopping(500, raw) is None
