"""How fast to ask: a window that grows while the service answers and shrinks when it says 429.

Additive increase, multiplicative decrease, as in TCP: the window doubles every round until the first 429, then gains
one a round and halves at each 429. `Retry-After` and the `x-ratelimit-*` headers stop everybody, not only the request
that got them, and the user's own limits space requests and tokens evenly. No clock is read here: every call is told
the time, in seconds since the epoch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from data_prep.errors import UserError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_BACKOFF = 60.0


class RateLimiter:
    """Says when the next request may go out.

    Args:
        most: requests under way at the same time, at most; the window begins at one.
        requests_per_minute, tokens_per_minute: limits of one's own; None: only those that the service shows.
        seed: of the jitter on pauses after failures.

    Raises:
        UserError: a number that would let nothing out.
    """

    def __init__(
        self,
        most: int = 64,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        seed: int = 0,
    ) -> None:
        if most < 1 or any(limit is not None and limit <= 0 for limit in (requests_per_minute, tokens_per_minute)):
            raise UserError("calls at a time, requests and tokens a minute: expected at least 1 of each")
        self.most, self.window, self.under_way = most, 1.0, 0
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._slow_start = True
        self._shrunk_at = 0.0  # a 429 to a request that left before says nothing new
        self._not_before = 0.0
        self._next_by_own_limits = 0.0
        self._failures = 0  # in a row
        self._jitter = random.Random(seed)

    def wait(self, now: float) -> float | None:
        """Seconds until a request may leave, 0 if it may now; None if first another must come back."""
        if self.under_way >= int(self.window):
            return None
        return max(0.0, self._not_before - now, self._next_by_own_limits - now)

    def leaves(self, now: float, tokens: float) -> None:
        """A request of about `tokens` tokens (in and out) goes out."""
        self.under_way += 1
        spacing = max(
            60 / self._requests if self._requests else 0.0, 60 * tokens / self._tokens if self._tokens else 0.0
        )
        self._next_by_own_limits = max(self._next_by_own_limits, now) + spacing

    def answered(self, now: float, headers: Mapping[str, str], tokens: float) -> None:
        """It came back with an answer; `tokens`: what the next one may need."""
        self.under_way -= 1
        self._failures = 0
        self.window = min(float(self.most), self.window + (1.0 if self._slow_start else 1.0 / self.window))
        for what, needed in (("requests", 1.0), ("tokens", tokens)):
            remaining, reset = headers.get(f"x-ratelimit-remaining-{what}"), headers.get(f"x-ratelimit-reset-{what}")
            if remaining is not None and reset is not None and _number(remaining) < needed:
                self._pause(now + duration(reset))

    def limited(self, now: float, left_at: float, headers: Mapping[str, str]) -> None:
        """It came back with 429; `left_at`: when it had gone out."""
        self.under_way -= 1
        if left_at >= self._shrunk_at:
            self._shrunk_at, self._slow_start = now, False
            self.window = max(1.0, self.window / 2)
        asked = retry_after(headers, now)
        self._failed(now) if asked is None else self._pause(now + asked)

    def failed(self, now: float, headers: Mapping[str, str]) -> None:
        """It came back with a 5xx, or not at all; a service in trouble gets a pause that doubles each time."""
        self.under_way -= 1
        asked = retry_after(headers, now)
        self._failed(now) if asked is None else self._pause(now + asked)

    def _failed(self, now: float) -> None:
        self._failures += 1
        longest = min(_LONGEST_BACKOFF, 2.0 ** min(self._failures, 10) / 2)
        self._pause(now + longest * self._jitter.uniform(0.5, 1.0))

    def _pause(self, until: float) -> None:
        self._not_before = max(self._not_before, until)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the service asks to wait: `retry-after-ms`, or `retry-after` in seconds or as an HTTP date.

    A date is compared with the service's own `date`, if it sends one, as the clocks need not agree.
    """
    milliseconds = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", milliseconds):
        return float(milliseconds) / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    until, there = _date(value), _date(headers.get("date", ""))
    if until is None:
        return None
    return max(0.0, until - (now if there is None else there))


def duration(text: str) -> float:
    """Seconds of "6m0s", "20ms", "1.5s" or "12", as rate limit headers write them; 0 for anything else."""
    parts = _DURATION.findall(text.strip())
    if "".join(number + unit for number, unit in parts) != text.strip():
        return 0.0
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _date(text: str) -> float | None:
    try:
        found: datetime = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")  # not a number: no limit that we could keep
