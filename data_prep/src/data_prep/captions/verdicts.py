"""Verdicts on answers, and their cost, as they go into the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.captions.judge import Limits, Verdict, judge
from data_prep.captions.ledger import RequestLedger, Usage
from data_prep.captions.settings import RunSettings


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
