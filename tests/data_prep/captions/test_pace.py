"""The pace: grows while it may, shrinks at a 429, and waits as long as it is told to."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from data_prep.captions.pace import Pace, duration, retry_after

NOW = 1_700_000_000.0


def answer(pace, times=1, now=NOW, headers=None):
    for _ in range(times):
        pace.leaves(now, 10)
        pace.answered(now, headers or {}, 10)


def test_the_window_begins_at_one_doubles_a_round_and_stops_at_the_most():
    pace = Pace(6)
    windows = []
    for _ in range(4):
        window = int(pace.window)
        windows.append(window)
        answer(pace, window)
    assert windows == [1, 2, 4, 6]


def test_a_full_window_waits_for_an_answer():
    pace = Pace(6)
    assert pace.wait(NOW) == 0
    pace.leaves(NOW, 10)
    assert pace.wait(NOW) is None
    pace.answered(NOW, {}, 10)
    assert pace.wait(NOW) == 0


def test_a_round_of_429s_halves_the_window_once_and_then_it_grows_by_one_a_round():
    pace = Pace(64)
    answer(pace, 15)
    assert pace.window == 16
    for _ in range(4):
        pace.leaves(NOW, 10)
    for _ in range(4):
        pace.limited(NOW + 1, NOW, {"retry-after": "0"})
    assert pace.window == 8
    answer(pace, 8, now=NOW + 2)
    assert 8.9 < pace.window < 9.1
    pace.leaves(NOW + 3, 10)
    pace.limited(NOW + 4, NOW + 3, {"retry-after": "0"})
    assert 4.4 < pace.window < 4.6


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
    pace = Pace()
    pace.leaves(NOW, 10)
    pace.limited(NOW, NOW, headers)
    if seconds is not None:
        assert pace.wait(NOW) == pytest.approx(seconds)
    else:
        assert 0.25 <= pace.wait(NOW) <= 1.0


def test_failures_without_advice_wait_longer_each_time_up_to_a_minute():
    pace, waits, now = Pace(), [], NOW
    for _ in range(12):
        pace.leaves(now, 10)
        pace.failed(now, {})
        waits.append(pace.wait(now))
        now += waits[-1]
    assert all(2**n / 4 <= wait <= 2**n for n, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[7:])
    answer(pace, now=now)
    pace.leaves(now, 10)
    pace.failed(now, {})
    assert pace.wait(now) <= 1


def test_rate_limit_headers_stop_before_the_429():
    pace = Pace()
    answer(pace, headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"})
    assert pace.wait(NOW) == pytest.approx(62)
    pace = Pace()
    answer(pace, headers={"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "400ms"})
    assert pace.wait(NOW) == pytest.approx(0.4)
    pace = Pace()
    answer(pace, headers={"x-ratelimit-remaining-tokens": "11", "x-ratelimit-reset-tokens": "400ms"})
    assert pace.wait(NOW) == 0


def test_ones_own_rates_space_requests_and_tokens():
    pace = Pace(10, requests_per_minute=120, tokens_per_minute=1200)
    pace.leaves(NOW, 5)
    pace.answered(NOW, {}, 5)
    assert pace.wait(NOW) == pytest.approx(0.5)
    pace.leaves(NOW + 1, 100)
    pace.answered(NOW + 1, {}, 100)
    assert pace.wait(NOW + 1) == pytest.approx(5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360), ("20ms", 0.02), ("1.5s", 1.5), ("12", 12), ("1h2m3s", 3723), ("", 0), ("later", 0), ("3d", 0)],
)
def test_durations_as_rate_limit_headers_write_them(text, seconds):
    assert duration(text) == pytest.approx(seconds)
