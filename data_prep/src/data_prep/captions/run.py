"""Sends the planned requests as fast as the service allows, until all are answered or the budget is used up.

What fails for one request is its own: it waits, is asked again, and after a few tries set aside, while the others go
on; so do those of other models where one is unknown. What holds for all ends the run: a wrong key, no money, or a
service that answers nobody. The images come in another order in each run, so that no image and no source of which
nothing can be described stands in the way of the rest.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.captions.faults import NO_MODEL, error_message
from data_prep.captions.images import ImageReader, place_of
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.pricing import Estimate, price_unpriced
from data_prep.captions.rate_limit import LONGEST_WAIT, RateLimiter, retry_after
from data_prep.captions.request import Request
from data_prep.captions.service import Answered, Declined, Lost, NotDone, Service, Stop
from data_prep.captions.settings import RunResult, RunSettings
from data_prep.captions.verdicts import judge_one, judge_waiting
from data_prep.errors import UserError
from data_prep.shards import ShardError

# After so many rounds of failures in a row without an answer the service is at fault, not the requests: a minute at
# least, if it does not say how long to wait, so that limits a minute have passed.
_ROUNDS = 9
_LOSSES = 5  # these may have cost money
# After so many images in a row about which it declines to talk, or about which it says what nobody can read.
_USELESS = 20
_USELESS_AT_FIRST = 5  # before anything was answered
_REJECTED = 100  # paid answers in a row that are no captions: model, prompt or options are wrong
_UNREADABLE = 20  # images in a row that cannot be read here
_READ_AHEAD = 64  # images
_LONG_PAUSE = 5.0  # seconds


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
        UserError: the service will answer nothing (wrong key, no money, no model that it knows, every call fails), or
            another run holds the ledger. What was answered before is kept.
        UserError, ShardError: no image can be read, or is the one that was planned.
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
        self._reader = ImageReader()
        (asked,) = self.ledger.db.execute("SELECT count(*) FROM attempt").fetchone()
        self._draw = random.Random(asked)  # another order in each run
        self._images = self.ledger.planned_images()
        self._draw.shuffle(self._images)
        self.queue: deque[Request] = deque()
        self._waiting: list[tuple[float, int, Request]] = []  # a heap: until when, place, request
        self.failures: Counter[int] = Counter()  # by place
        self._answers = 0
        self._rejected: Counter[str] = Counter()  # since one was accepted
        self._suspects: dict[str, int] = {}  # images about which a call failed -> how many answers there were before
        self._losses = 0  # rounds in a row
        self._last = ""  # failure, as it is shown
        self._useless_status, self._useless_message = 0, ""
        self._useless: dict[str, list[tuple[int, int, str]]] = {}  # image -> attempts since an answer was of use
        self._unknown: set[str] = set()  # models
        self._unreadable: set[str] | None = set()  # images in a row; None as soon as one can be read

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
        if self._useless and not self._answers and self._useless_status in (403, 404):
            self._no_use()  # of few images, but nothing else came either
        if self.error:
            for attempt, status, note in (one for attempts in self._useless.values() for one in attempts):
                if status != 200:  # declined since the service went wrong, so that it is planned again
                    self.ledger.not_done(attempt, status, note, now=time.time())
            raise self.error
        if self.result.later and not self._answers:
            self.result.stopped = self.result.stopped or f"{self.service.url} answered nothing ({self._last})"
        return self.result

    def _launch(self, under_way: set[asyncio.Task[None]]) -> float | None:
        """Send the next request, if possible; returns seconds until the next try, None to wait for a call to end."""
        request, pause = self._next()
        if request is None:
            return pause
        pause = self.limiter.wait(time.time())
        if pause is not None and pause > _LONG_PAUSE and not under_way:
            limits = f"{self.service.url} asks or this run's own limits do"
            self.log(f"waiting {pause:.0f} seconds {f'after {self._last}' if self.limiter.rounds else f'as {limits}'}")
        if pause is None or pause > 0:
            return pause
        image = self._read(request)
        if image is None:
            self.queue.popleft()
            return 0.0
        prompt, completion = self.estimate.tokens(request, image[1])
        most = self.settings.prices.cost(prompt, completion) if self.settings.prices else None
        if self.settings.budget is not None and self.spent + (most or 0.0) > self.settings.budget:
            if not under_way:  # answers under way may cost less than the maximum that is reserved for them
                self.result.stopped = f"the budget of {self.settings.budget:g} does not allow another request"
            return None
        self.queue.popleft()
        under_way.add(asyncio.create_task(self._ask(request, image, prompt + completion, most)))
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

    # --- what is asked next

    def _next(self) -> tuple[Request | None, float | None]:
        """(the next request, which stays in the queue; if there is none, None and seconds until there is one)."""
        if self.settings.limit is not None and self.result.asked >= self.settings.limit:
            return None, None
        now = time.time()
        while self._waiting and self._waiting[0][0] <= now:
            self.queue.append(heapq.heappop(self._waiting)[2])
        while not self.queue and self._images:
            images = [self._images.pop() for _ in range(min(_READ_AHEAD, len(self._images)))]
            about = self.ledger.planned_about(images)
            self._draw.shuffle(about)
            self.queue.extend(one for one in about if one.model not in self._unknown)
        if self.queue:
            return self.queue[0], 0.0
        return None, self._waiting[0][0] - now if self._waiting else None

    def _read(self, request: Request) -> tuple[str, bytes] | None:
        """(media type, bytes) of the request's image; None if it cannot be read, which holds nobody up."""
        try:
            image = self._reader.of(request)
        except (UserError, ShardError) as error:
            self.result.unreadable += 1
            self.result.unusable[place_of(request.dataset, request.number)] = str(error)
            self.result.stopped = self.result.stopped or f"not all images can be used, the first: {error}"
            if self._unreadable is not None:
                self._unreadable.add(request.image)
                if len(self._unreadable) >= _UNREADABLE:
                    raise
            return None
        self._unreadable = None
        return image

    def _again(self, request: Request, failure: NotDone, now: float) -> None:
        """Ask again, set aside, or leave for the next run what was not done."""
        self.result.not_done += 1
        if failure.limited:
            self.queue.append(request)
            return
        self.failures[request.place] += 1
        tries = self.failures[request.place]
        if tries < self.settings.tries:
            wait = retry_after(failure.headers, now) or 2.0 ** min(tries - 2, 8)
            own = tries > 1 and failure.status is not None
            heapq.heappush(self._waiting, (now + (min(wait, LONGEST_WAIT) if own else 0.0), request.place, request))
            return
        # Its own fault only if the service was there for others, or if it fails in a second run as well.
        others = self._answers > self._suspects.get(request.image, self._answers)
        if failure.status is not None and (others or self.ledger.failures(request.place) >= 2 * self.settings.tries):
            self.ledger.set_aside(request.place)
            self.result.failed += 1
        else:
            self.result.later += 1

    # --- what came of it

    async def _ask(self, request: Request, image: tuple[str, bytes], tokens: int, most: float | None) -> None:
        sent_at = time.time()
        (attempt,) = self.ledger.sent([(request.place, most)], now=sent_at)
        outcome = await self.service.ask(request, *image)
        now = time.time()
        match outcome:
            case Answered(_, _, headers) | Declined(_, _, headers):
                self.limiter.answered(now, headers, tokens)
                self._take(request, attempt, outcome, most)
            case NotDone(status, note):
                self.ledger.not_done(attempt, status, note, now=now)
                self.spent -= most or 0.0
                self._hold_back(request, sent_at, outcome)
                self._again(request, outcome, now)
            case Stop(status, message, means):
                self.limiter.set_aside()
                self.ledger.not_done(attempt, status, message, now=now)
                self.spent -= most or 0.0
                error = self.service.stopping_error(status, message, means)
                if means != NO_MODEL or not self._go_on_without(request.model, error):
                    self._stop(error)
            case Lost(note):
                self.ledger.lost(attempt, note, now=now)
                self.result.lost += 1
                self._losses += self._hold_back(request, sent_at, outcome)
                if self._losses >= _LOSSES:
                    self._give_up(
                        f"the connection to {self.service.url} broke {_LOSSES} times in a row after the request had "
                        f"left, which may cost money ({note})"
                    )
        self.tick(self.result)

    def _take(self, request: Request, attempt: int, answer: Answered | Declined, most: float | None) -> None:
        """Keep an answer, and judge it."""
        status, raw = answer.status, answer.raw
        self.ledger.received(attempt, status, raw, now=time.time())
        verdict, cost = judge_one(self.ledger, self.settings, attempt, status, raw, request.language)
        self.estimate.learn(request.model, verdict.usage)
        self.spent += (cost - most) if cost is not None and most is not None else 0.0
        if verdict.reason is None:
            self.result.accepted += 1
            self._rejected.clear()
        else:
            self.result.rejected[verdict.reason] += 1
            self._rejected[verdict.reason] += 1
        if verdict.reason in ("declined", "malformed"):
            self._of_no_use(request, attempt, status, raw)
            return
        if self._rejected.total() >= _REJECTED:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._rejected.most_common(3))
            found = f"{_REJECTED} answers in a row are no captions ({reasons}), and all are paid"
            self._give_up(f"{self.service.url}: {found}")
        self._answers += 1
        self._losses = 0
        self._useless.clear()
        self._suspects.pop(request.image, None)

    def _of_no_use(self, request: Request, attempt: int, status: int, raw: bytes) -> None:
        """Stop if nothing but this comes."""
        message = error_message(raw)
        self._useless.setdefault(request.image, []).append((attempt, status, message))
        self._useless_status, self._useless_message = status, message
        if len(self._useless) >= (_USELESS if self._answers else _USELESS_AT_FIRST) and not self.stopping.is_set():
            self._no_use()

    def _no_use(self) -> None:
        """Stop, as nothing of use comes."""
        status, message = self._useless_status, self._useless_message
        if status == 200:
            self._give_up(f"{self.service.url} sends what is no answer of a chat completion ({message})")
        elif status in (403, 404):
            self._stop(self.service.stopping_error(status, message, status))
        else:
            self._give_up(f"{self.service.url} declines every request ({message})")

    def _hold_back(self, request: Request, sent_at: float, failure: NotDone | Lost) -> bool:
        """Hold the others back if a failure may be theirs as well; returns whether it is a new one in a row."""
        now, rounds, lost = time.time(), self.limiter.rounds, isinstance(failure, Lost)
        headers = {} if isinstance(failure, Lost) else failure.headers
        limited = isinstance(failure, NotDone) and failure.limited
        status = None if isinstance(failure, Lost) else failure.status
        self._last = f"status {status}: {failure.note}" if status else failure.note
        if limited:
            self.limiter.limited(now, sent_at, headers)
        elif (lost or status) and request.image in self._suspects:
            self.limiter.set_aside()
            return False
        else:
            self.limiter.failed(now, sent_at, headers)
            if lost or status:  # without a connection it is nobody's fault
                self._suspects[request.image] = self._answers
        if self.limiter.rounds >= _ROUNDS:
            what = "asks all to wait" if limited else "failed"
            self._give_up(f"{self.service.url} {what}, {_ROUNDS} times in a row without an answer ({self._last})")
        return self.limiter.rounds > rounds

    def _go_on_without(self, model: str, error: UserError) -> bool:
        """Leave the requests of an unknown model planned; returns whether there are requests of others."""
        self._unknown.add(model)
        self.queue = deque(one for one in self.queue if one.model != model)
        self._waiting = sorted(one for one in self._waiting if one[2].model != model)
        self.result.stopped = self.result.stopped or f"{model}: {error}; its requests stay planned"
        return bool(self.ledger.planned_models() - self._unknown)

    def _give_up(self, message: str) -> None:
        self._stop(UserError(f"{message}; see what is wrong and run again; the run continues from there"))

    def _stop(self, error: UserError) -> None:
        self.error = self.error or error
        self.stopping.set()

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
