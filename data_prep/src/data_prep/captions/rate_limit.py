"""How many requests to send, and when: a congestion window, as in TCP.

The window doubles every round until the first 429 (slow start), then grows by one a round and halves at each 429.
`Retry-After` and the `x-ratelimit-*` headers pause all requests, not only the one that got them, and the user's own
limits space requests and tokens evenly. Not urllib3's `Retry`: it retries one request by itself, while here the ledger
decides what may be sent again. No clock is read here: every call gets the time, in seconds since the epoch.
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
    """Decides when the next request may be sent.

    Args:
        most: concurrent requests at most; the window begins at 1.
        requests_per_minute, tokens_per_minute: the user's own limits; None: only those of the service.
        seed: of the jitter on pauses after failures.

    Raises:
        UserError: a limit that would let no request pass.
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
        self._shrunk_at = 0.0  # ignore 429s of requests sent before
        self._not_before = 0.0
        self._next_by_own_limits = 0.0
        self._failures = 0  # in a row
        self._jitter = random.Random(seed)

    def wait(self, now: float) -> float | None:
        """Seconds until a request may be sent, 0 if now; None if one under way has to finish first."""
        if self.under_way >= int(self.window):
            return None
        return max(0.0, self._not_before - now, self._next_by_own_limits - now)

    def sent(self, now: float, tokens: float) -> None:
        """A request of about `tokens` tokens (in and out) is sent."""
        self.under_way += 1
        spacing = max(
            60 / self._requests if self._requests else 0.0, 60 * tokens / self._tokens if self._tokens else 0.0
        )
        self._next_by_own_limits = max(self._next_by_own_limits, now) + spacing

    def answered(self, now: float, headers: Mapping[str, str], tokens: float) -> None:
        """A request was answered; `tokens`: what the next one may need."""
        self.under_way -= 1
        self._failures = 0
        self.window = min(float(self.most), self.window + (1.0 if self._slow_start else 1.0 / self.window))
        for what, needed in (("requests", 1.0), ("tokens", tokens)):
            remaining, reset = headers.get(f"x-ratelimit-remaining-{what}"), headers.get(f"x-ratelimit-reset-{what}")
            if remaining is not None and reset is not None and _number(remaining) < needed:
                self._pause(now + duration(reset))

    def limited(self, now: float, sent_at: float, headers: Mapping[str, str]) -> None:
        """A request got 429; `sent_at`: when it was sent."""
        if sent_at >= self._shrunk_at:
            self._shrunk_at, self._slow_start = now, False
            self.window = max(1.0, self.window / 2)
        self.failed(now, headers)

    def failed(self, now: float, headers: Mapping[str, str]) -> None:
        """A request got 5xx or no answer: exponential backoff, unless the service says how long to wait."""
        self.under_way -= 1
        if (asked := retry_after(headers, now)) is not None:
            self._pause(now + asked)
            return
        self._failures += 1
        longest = min(_LONGEST_BACKOFF, 2.0 ** min(self._failures, 10) / 2)
        self._pause(now + longest * self._jitter.uniform(0.5, 1.0))

    def _pause(self, until: float) -> None:
        self._not_before = max(self._not_before, until)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, as the service asks: `retry-after-ms`, or `retry-after` in seconds or as an HTTP date.

    A date is compared with the service's own `date` header if there is one, since the clocks may differ.
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
        return float("inf")  # not a number: ignore this limit
