"""The rate limiter: grows while it may, shrinks at a 429, and waits as long as it is told to."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from data_prep.captions.rate_limit import LONGEST_WAIT, RateLimiter, retry_after

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
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, None),
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
        limiter.failed(now, now, {})
        waits.append(limiter.wait(now))
        now += waits[-1]
    assert all(2**n / 4 <= wait <= 2**n for n, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[7:])
    answer(limiter, now=now)
    limiter.sent(now, 10)
    limiter.failed(now, now, {})
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
    [
        ("6m0s", 360), ("20ms", 0.02), ("1.5s", 1.5), ("12", 12), ("1h2m3s", 3723), ("", None), ("later", None),
        ("3d", 259200), ("nan", None), ("inf", None), ("-5", 0),
        ("1 min 30 sec", 90), ("PT1M30S", 90), ("500 milliseconds", 0.5), ("3 moons", None),
        ("Tue Nov 14 22:14:00 2023", 40),
        (str(int(NOW) + 40), 40), (f"{NOW + 40:.3f}", 40), (str(int(NOW + 40) * 10**3), 40),
        (str(int(NOW + 40) * 10**6), 40), (str(int(NOW + 40) * 10**9), 40), ("2023-11-14T22:14:00Z", 40),
        ("2023-11-15T00:14:00+02:00", 40), ("Tue, 14 Nov 2023 22:14:00 GMT", 40),
        (str(int(NOW) - 40), None), (str(int(NOW - 40) * 1000), None), ("2023-11-14T22:12:00Z", None),
    ],
)  # fmt: skip
def test_clocks_in_every_form_that_headers_have_them(text, seconds):
    assert retry_after({"retry-after": text}, NOW) == (seconds if seconds is None else pytest.approx(seconds))
    limiter = RateLimiter()
    answer(limiter, headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": text})
    assert limiter.wait(NOW) == pytest.approx(min(seconds or 0, LONGEST_WAIT))


@pytest.mark.parametrize("remaining", ["-1", "none", ""])
def test_a_limit_that_is_none_holds_nobody_back(remaining):
    limiter = RateLimiter()
    answer(limiter, headers={"x-ratelimit-remaining-requests": remaining, "x-ratelimit-reset-requests": "60"})
    assert limiter.wait(NOW) == 0


@pytest.mark.parametrize("headers", [{"retry-after": "86400"}, {"retry-after-ms": "9e9"}, {"retry-after": "1e308"},
                                     {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}])  # fmt: skip
def test_no_wait_is_longer_than_the_limit(headers):
    for fail in (RateLimiter.limited, RateLimiter.failed):
        limiter = RateLimiter()
        for _ in range(12):
            limiter.sent(NOW, 10)
            fail(limiter, NOW, NOW, headers)
            assert 0 < limiter.wait(NOW) <= LONGEST_WAIT


def test_a_service_that_asks_for_no_wait_is_not_asked_all_the_time():
    """A reset that is past already, or after a few rounds one that is too short."""
    for headers in ({"retry-after": "0"}, {"retry-after": formatdate(NOW - 60)}, {"retry-after-ms": "1"}):
        limiter = RateLimiter()
        for _ in range(6):
            limiter.sent(NOW, 10)
            limiter.limited(NOW, NOW, headers)
        assert limiter.wait(NOW) > 5


def test_calls_that_fail_together_are_one_round_and_the_service_has_to_show_that_it_is_back():
    limiter = RateLimiter(64)
    answer(limiter, 31)
    for _ in range(20):
        limiter.sent(NOW, 10)
    for _ in range(20):
        limiter.failed(NOW + 1, NOW, {})
    assert (limiter.rounds, int(limiter.window)) == (1, 32)
    limiter.sent(NOW + 2, 10)
    limiter.failed(NOW + 3, NOW + 2, {})
    assert (limiter.rounds, int(limiter.window)) == (2, 1)
    answer(limiter, now=NOW + 4)
    assert (limiter.rounds, int(limiter.window)) == (0, 2)
