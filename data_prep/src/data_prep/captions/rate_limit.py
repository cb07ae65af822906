"""How many requests to send, and when: a congestion window, as in TCP.

The window doubles every round until the first 429 (slow start), then grows by one a round and halves at each 429.
`Retry-After` and the `x-ratelimit-*` headers pause all requests, not only the one that got them, but never for longer
than `LONGEST_WAIT`; the user's own limits space requests and tokens evenly. Not urllib3's `Retry`: it retries one
request by itself, while here the ledger decides what may be sent again. No clock is read here: every call gets the
time, in seconds since the epoch.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from data_prep.errors import UserError

# "6m0s", "1 min 30 sec", and ISO 8601's "PT1M30S" without its beginning.
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|milli[a-z]*|s(?:ec[a-z]*)?|m(?:in[a-z]*)?|h(?:ours?)?|d(?:ays?)?)?")
_SECONDS = {"s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_BACKOFF = 60.0
LONGEST_WAIT = 300.0  # seconds; what a service asks for beyond that is a mistake, or no run can wait for it
_ADVISED = 3  # rounds of failures in which a service's advice is taken for less than our own backoff
_EPOCH = 1e9  # a larger number is no duration but a date, in seconds, or in thousandths, millionths, … of them


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
        self.rounds = 0  # of failures in a row; calls that are out together and fail together are one
        self._failed_at = 0.0  # when the last round was counted
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
        self.rounds = 0
        self.window = min(float(self.most), self.window + (1.0 if self._slow_start else 1.0 / self.window))
        self._pause(now + min(reset(headers, now, tokens) or 0.0, LONGEST_WAIT))

    def limited(self, now: float, sent_at: float, headers: Mapping[str, str]) -> None:
        """A request got 429; `sent_at`: when it was sent."""
        if sent_at >= self._shrunk_at:
            self._shrunk_at, self._slow_start = now, False
            self.window = max(1.0, self.window / 2)
        self._failed(now, sent_at, headers)

    def failed(self, now: float, sent_at: float, headers: Mapping[str, str]) -> None:
        """A request got 5xx or no answer: exponential backoff, unless the service says how long to wait."""
        self._failed(now, sent_at, headers)
        if self.rounds > 1:  # as TCP after a timeout: the service has to show that it is there
            self.window, self._slow_start = 1.0, True

    def set_aside(self) -> None:
        """A request failed by a fault of its own, which is no reason for the others to wait."""
        self.under_way -= 1

    def _failed(self, now: float, sent_at: float, headers: Mapping[str, str]) -> None:
        self.under_way -= 1
        if sent_at >= self._failed_at:
            self.rounds, self._failed_at = self.rounds + 1, now
        backoff = min(_LONGEST_BACKOFF, 2.0 ** min(self.rounds, 10) / 2) * self._jitter.uniform(0.5, 1.0)
        asked = retry_after(headers, now) or reset(headers, now, 1.0)
        if asked and self.rounds > _ADVISED:
            asked = max(asked, backoff)
        self._pause(now + min(asked or backoff, LONGEST_WAIT))

    def _pause(self, until: float) -> None:
        self._not_before = max(self._not_before, until)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, as the service asks: `retry-after-ms`, or `retry-after` in any form; None for nothing."""
    milliseconds = headers.get("retry-after-ms", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", milliseconds):
        return _wait(milliseconds, now, headers, unit=0.001)
    return _wait(headers.get("retry-after", ""), now, headers)


def reset(headers: Mapping[str, str], now: float, tokens: float) -> float | None:
    """Seconds until a limit that is used up, of requests or of `tokens`, is reset; None if none is."""
    waits = []
    for what, needed in (("-requests", 1.0), ("-tokens", tokens), ("", 1.0)):
        remaining = _number(headers.get(f"x-ratelimit-remaining{what}"))
        if remaining is not None and 0 <= remaining < needed:  # below 0: no limit
            waits.append(_wait(headers.get(f"x-ratelimit-reset{what}", ""), now, headers))
    return max((wait for wait in waits if wait is not None), default=None)


def _wait(text: str, now: float, headers: Mapping[str, str], *, unit: float = 1.0) -> float | None:
    """Seconds from now of "6m0s", "20ms", "12", an HTTP date, an ISO date, or a date as a number; None for else.

    A date is compared with the service's own `date` header if there is one, since the clocks may differ. One that is
    past asks for nothing.
    """
    text = text.strip()
    number = _number(text)
    if number is not None and number < _EPOCH:
        return max(0.0, number) * unit
    until = _date(text) if number is None else number
    if until is None:
        spelled = re.sub(r"^p?t|\s", "", text.lower())
        parts = _DURATION.findall(spelled)
        whole = parts and "".join(digits + name for digits, name in parts) == spelled
        return sum(float(digits) * _seconds(name) for digits, name in parts) if whole else None
    there = _date(headers.get("date", ""))
    here = now if there is None else there
    while until > 100 * _EPOCH:  # until the year 5138
        until /= 1000
    return max(0.0, until - here) or None


def _seconds(unit: str) -> float:
    return 0.001 if unit.startswith(("ms", "milli")) else _SECONDS[unit[:1]]


def _date(text: str) -> float | None:
    try:
        asctime = re.match(r"[A-Z][a-z]{2} [A-Z]", text)
        found = parsedate_to_datetime(text) if "," in text or asctime else datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
