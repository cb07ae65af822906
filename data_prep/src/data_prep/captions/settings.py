"""How a run judges answers, what it may spend, and what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from data_prep.captions.judge import Limits
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


@dataclass
class RunResult:
    """What a run did. lost: perhaps paid; failed: set aside; later: requests that failed too often and stay planned;
    unreadable: those whose image cannot be read, which stay planned, too; unusable: the place of each such image → why.
    """

    asked: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    not_done: int = 0
    lost: int = 0
    failed: int = 0
    later: int = 0
    unreadable: int = 0
    unusable: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None  # why the run ended before the work did
