"""The rate limiter: grows while it may, shrinks at a 429, and waits as long as it is told to."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from data_prep.captions.rate_limit import RateLimiter, duration, retry_after

NOW = 1_700_000_000.0


def answer(limiter, times=1, now=NOW, headers=None):
    for _ in range(times):
        limiter.sent(now, 10)
        limiter.answered(now, headers or {}, 10)


def test_the_window_begins_at_one_doubles_a_round_and_stops_at_the_most():
    limiter = RateLimiter(6)
    windows = []
    for _ in range(4):
        window = int(limiter.window)
        windows.append(window)
        answer(limiter, window)
    assert windows == [1, 2, 4, 6]


def test_a_full_window_waits_for_an_answer():
    limiter = RateLimiter(6)
    assert limiter.wait(NOW) == 0
    limiter.sent(NOW, 10)
    assert limiter.wait(NOW) is None
    limiter.answered(NOW, {}, 10)
    assert limiter.wait(NOW) == 0


def test_a_round_of_429s_halves_the_window_once_and_then_it_grows_by_one_a_round():
    limiter = RateLimiter(64)
    answer(limiter, 15)
    assert limiter.window == 16
    for _ in range(4):
        limiter.sent(NOW, 10)
    for _ in range(4):
        limiter.limited(NOW + 1, NOW, {"retry-after": "0"})
    assert limiter.window == 8
    answer(limiter, 8, now=NOW + 2)
    assert 8.9 < limiter.window < 9.1
    limiter.sent(NOW + 3, 10)
    limiter.limited(NOW + 4, NOW + 3, {"retry-after": "0"})
    assert 4.4 < limiter.window < 4.6


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30),
        ({"retry-after": formatdate(NOW + 3630, usegmt=True), "date": formatdate(NOW + 3600, usegmt=True)}, 30),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_seconds_and_as_a_date_by_the_services_own_clock(headers, seconds):
    assert retry_after(headers, NOW) == seconds
    limiter = RateLimiter()
    limiter.sent(NOW, 10)
    limiter.limited(NOW, NOW, headers)
    if seconds is not None:
        assert limiter.wait(NOW) == pytest.approx(seconds)
    else:
        assert 0.25 <= limiter.wait(NOW) <= 1.0


def test_failures_without_advice_wait_longer_each_time_up_to_a_minute():
    limiter, waits, now = RateLimiter(), [], NOW
    for _ in range(12):
        limiter.sent(now, 10)
        limiter.failed(now, {})
        waits.append(limiter.wait(now))
        now += waits[-1]
    assert all(2**n / 4 <= wait <= 2**n for n, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[7:])
    answer(limiter, now=now)
    limiter.sent(now, 10)
    limiter.failed(now, {})
    assert limiter.wait(now) <= 1


def test_rate_limit_headers_stop_before_the_429():
    limiter = RateLimiter()
    answer(limiter, headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"})
    assert limiter.wait(NOW) == pytest.approx(62)
    limiter = RateLimiter()
    answer(limiter, headers={"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "400ms"})
    assert limiter.wait(NOW) == pytest.approx(0.4)
    limiter = RateLimiter()
    answer(limiter, headers={"x-ratelimit-remaining-tokens": "11", "x-ratelimit-reset-tokens": "400ms"})
    assert limiter.wait(NOW) == 0


def test_ones_own_rates_space_requests_and_tokens():
    limiter = RateLimiter(10, requests_per_minute=120, tokens_per_minute=1200)
    limiter.sent(NOW, 5)
    limiter.answered(NOW, {}, 5)
    assert limiter.wait(NOW) == pytest.approx(0.5)
    limiter.sent(NOW + 1, 100)
    limiter.answered(NOW + 1, {}, 100)
    assert limiter.wait(NOW + 1) == pytest.approx(5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360), ("20ms", 0.02), ("1.5s", 1.5), ("12", 12), ("1h2m3s", 3723), ("", 0), ("later", 0), ("3d", 0)],
)
def test_durations_as_rate_limit_headers_write_them(text, seconds):
    assert duration(text) == pytest.approx(seconds)
