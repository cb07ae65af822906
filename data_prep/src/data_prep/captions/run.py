"""Sends the planned requests as fast as the service allows, until all are answered or the budget is used up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_prep.captions.images import ImageReader
from data_prep.captions.judge import Limits, Verdict, judge
from data_prep.captions.ledger import Request, RequestLedger, Usage
from data_prep.captions.pricing import Estimate, Prices, price_unpriced
from data_prep.captions.rate_limit import RateLimiter
from data_prep.captions.service import Answered, Lost, NotDone, Service, Stop, error_message
from data_prep.errors import UserError

# After so many calls in a row without an answer the service is at fault, not the requests.
_FAILURES = 20
_LOSSES = 5  # these may have cost money
_REFUSED = 5
_READ_AHEAD = 256
_LONG_PAUSE = 5.0  # seconds


@dataclass(frozen=True)
class RunSettings:
    """How to run.

    limit: requests to send at most. tries: 5xx and failed connections of one request in this run before it is left for
    the next. budget: the cost of this ledger at most, over all runs; needs prices. image_tokens: see `Estimate`.
    """

    limit: int | None = None
    tries: int = 6
    budget: float | None = None
    prices: Prices | None = None
    image_tokens: int | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.budget is not None and self.prices is None:
            raise UserError("a budget needs prices: give --price-in and --price-out, per million tokens")
        if self.tries < 1 or min(self.limit or 0, self.budget or 0) < 0:
            raise UserError(
                f"tries {self.tries}, limit {self.limit}, budget {self.budget}: expected one try or more, and no limit "
                "or budget below 0"
            )
        if self.image_tokens is not None and self.image_tokens < 0:
            raise UserError(f"image_tokens {self.image_tokens}: expected 0 or more")


@dataclass
class RunResult:
    """What a run did. lost: perhaps paid; later: requests that failed too often and stay planned."""

    asked: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    not_done: int = 0
    lost: int = 0
    later: int = 0
    stopped: str | None = None  # why the run ended before the work did


def judge_waiting(ledger: RequestLedger, settings: RunSettings) -> None:
    """Judge the answers that a killed run left unjudged. Sends nothing."""
    for row in ledger.unjudged():
        batch = row["batch"] is not None
        judge_one(ledger, settings, row["id"], row["status"], row["raw"], row["language"], batch=batch)


def judge_one(
    ledger: RequestLedger,
    settings: RunSettings,
    attempt: int,
    status: int,
    raw: bytes,
    language: str,
    *,
    batch: bool = False,
) -> tuple[Verdict, float | None]:
    """Judge an answer, and commit the verdict and the cost, which are returned."""
    prompts = [row["text"] for row in ledger.db.execute("SELECT text FROM prompt WHERE language = ?", (language,))]
    verdict = verdict_on(status, raw, language, settings.limits, prompts)
    cost = settings.prices.of(verdict.usage, batch=batch) if settings.prices else None
    ledger.judged(attempt, verdict.caption, verdict.reason, verdict.usage, cost)
    return verdict, cost


def verdict_on(status: int, raw: bytes, language: str, limits: Limits, prompts: Sequence[str] = ()) -> Verdict:
    """The verdict on an answer of this status."""
    return judge(raw, language, limits, prompts=prompts) if status == 200 else Verdict(None, "declined", Usage())


def run(
    ledger: RequestLedger,
    service: Service,
    limiter: RateLimiter,
    settings: RunSettings,
    *,
    tick: Callable[[RunResult], None] = lambda result: None,
    log: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Send all planned requests.

    After SIGINT or SIGTERM the run waits for the calls under way and ends. `tick` is called after each call, `log` when
    the service asks for a longer pause.

    Raises:
        UserError: the service will answer nothing (wrong key, no money, no such model, every call fails), an image is
            no longer the one that was planned, or another run holds the ledger. What was answered before is kept.
    """
    with ledger.exclusive():
        judge_waiting(ledger, settings)
        if settings.prices:
            price_unpriced(ledger, settings.prices, settings.image_tokens)
        return asyncio.run(_Run(ledger, service, limiter, settings, tick, log).drive())


@dataclass
class _Run:
    ledger: RequestLedger
    service: Service
    limiter: RateLimiter
    settings: RunSettings
    tick: Callable[[RunResult], None]
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self.result = RunResult()
        self.error: UserError | None = None
        self.estimate = Estimate(self.ledger, self.settings.image_tokens)
        self.spent = self.ledger.spent()
        self.queue: deque[Request] = deque()
        self.failures: Counter[str] = Counter()
        self._read_to = 0
        self._reader = ImageReader()
        self._in_a_row: Counter[str] = Counter()

    async def drive(self) -> RunResult:
        """Launch calls while the rate limiter allows and requests are left, then wait for those under way."""
        self.stopping = asyncio.Event()
        self._catch_signals()
        under_way: set[asyncio.Task[None]] = set()
        try:
            while not self.stopping.is_set():
                pause = self._launch(under_way)
                if pause is None and not under_way:
                    break
                under_way = await self._wait(under_way, pause)
        finally:
            # What was sent is paid for: take every answer, even after an error.
            ended = await asyncio.gather(*under_way, return_exceptions=True)
            await self.service.client.close()
        for fault in ended:
            if fault is not None:
                raise fault
        if self.error:
            raise self.error
        return self.result

    def _launch(self, under_way: set[asyncio.Task[None]]) -> float | None:
        """Send the next request, if possible; returns seconds until the next try, None to wait for a call to end."""
        request = self._peek()
        pause = None if request is None else self.limiter.wait(time.time())
        if pause is not None and pause > _LONG_PAUSE and not under_way:
            self.log(f"waiting {pause:.0f} seconds, as {self.service.url} asks or this run's own limits do")
        if request is None or pause is None or pause > 0:
            return pause
        mime, image = self._reader.of(request)
        prompt, completion = self.estimate.tokens(request, image)
        most = self.settings.prices.cost(prompt, completion) if self.settings.prices else None
        if self.settings.budget is not None and self.spent + (most or 0.0) > self.settings.budget:
            if not under_way:  # answers under way may cost less than the maximum that is reserved for them
                self.result.stopped = f"the budget of {self.settings.budget:g} does not allow another request"
            return None
        self.queue.popleft()
        under_way.add(asyncio.create_task(self._ask(request, mime, image, prompt + completion, most)))
        self.result.asked += 1
        self.spent += most or 0.0
        self.limiter.sent(time.time(), prompt + completion)
        return 0.0

    async def _wait(self, under_way: set[asyncio.Task[None]], pause: float | None) -> set[asyncio.Task[None]]:
        """Wait for a call to end, for the pause to be over, or for the signal to stop; returns the calls under way."""
        stop = asyncio.create_task(self.stopping.wait())
        watched = under_way if self.stopping.is_set() else {*under_way, stop}
        done, _ = await asyncio.wait(watched, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in done - {stop}:
            task.result()  # raises if there is a bug of ours
        return under_way - done

    async def _ask(self, request: Request, mime: str, image: bytes, tokens: int, most: float | None) -> None:
        sent_at = time.time()
        (attempt,) = self.ledger.sent([(request.id, most)], now=sent_at)
        outcome = await self.service.ask(request, mime, image)
        now = time.time()
        match outcome:
            case Answered(status, raw, headers):
                self.limiter.answered(now, headers, tokens)
                self.ledger.received(attempt, status, raw, now=now)
                verdict, cost = judge_one(self.ledger, self.settings, attempt, status, raw, request.language)
                self.estimate.learn(request.model, verdict.usage)
                self.spent += (cost - most) if cost is not None and most is not None else 0.0
                self._count(verdict.reason, raw)
            case NotDone(status, note, limited, headers):
                if limited:
                    self.limiter.limited(now, sent_at, headers)
                else:
                    self.limiter.failed(now, headers)
                self.ledger.not_done(attempt, status, note, now=now)
                self.spent -= most or 0.0
                self._put_back(request, outcome)
            case Stop(status, message):
                self.limiter.failed(now, {})
                self.ledger.not_done(attempt, status, message, now=now)
                self.spent -= most or 0.0
                self._stop(self.service.stopping_error(status, message))
            case Lost(note):
                self.limiter.failed(now, {})
                self.ledger.lost(attempt, note, now=now)
                self.result.lost += 1
                self._fails(
                    "lost",
                    _LOSSES,
                    f"the connection to {self.service.url} broke {_LOSSES} times in a row after the "
                    f"request had left, which may cost money ({note})",
                )
        self.tick(self.result)

    def _count(self, reason: str | None, raw: bytes) -> None:
        self._in_a_row["lost"] = self._in_a_row["failed"] = 0
        if reason is None:
            self.result.accepted += 1
            return
        self.result.rejected[reason] += 1
        others = self.result.accepted + sum(self.result.rejected.values()) - self.result.rejected["declined"]
        if reason == "declined" and not others:
            self._fails("declined", _REFUSED, f"{self.service.url} declines every request ({error_message(raw)})")

    def _put_back(self, request: Request, outcome: NotDone) -> None:
        self.result.not_done += 1
        if not outcome.limited:
            self.failures[request.id] += 1
            self._fails("failed", _FAILURES, f"{self.service.url} failed {_FAILURES} times in a row ({outcome.note})")
        if self.failures[request.id] < self.settings.tries:
            self.queue.append(request)
        else:
            self.result.later += 1

    def _fails(self, what: str, most: int, message: str) -> None:
        self._in_a_row[what] += 1
        if self._in_a_row[what] >= most:
            self._stop(UserError(f"{message}; see what is wrong and run again; the run continues from there"))

    def _stop(self, error: UserError) -> None:
        self.error = self.error or error
        self.stopping.set()

    def _peek(self) -> Request | None:
        if self.settings.limit is not None and self.result.asked >= self.settings.limit:
            return None
        if not self.queue:
            for place, request in self.ledger.planned(_READ_AHEAD, after=self._read_to):
                self._read_to = place
                self.queue.append(request)
        return self.queue[0] if self.queue else None

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            loop.remove_signal_handler(number)  # a second signal ends the program at once
            self.result.stopped = self.result.stopped or f"{signal.Signals(number).name}"
            self.stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, stop, number)
            except (NotImplementedError, ValueError, RuntimeError):  # not the main thread, which alone gets signals
                return
