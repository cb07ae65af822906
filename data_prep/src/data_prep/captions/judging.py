"""How a run judges answers and what it may spend, and the verdicts that go into the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.captions.judge import Limits, Verdict, judge
from data_prep.captions.ledger import RequestLedger, Usage
from data_prep.captions.pricing import Prices
from data_prep.errors import UserError


@dataclass(frozen=True)
class RunSettings:
    """How to run.

    limit: requests to send at most. tries: 5xx and failed connections of one request in this run before it is set
    aside, or, if the service answered nothing meanwhile, left for the next run. budget: the cost of this ledger at
    most, over all runs; needs prices. image_tokens: see `Estimate`.
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
