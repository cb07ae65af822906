"""Verdicts on answers, and their cost, as they go into the ledger; and once more, by the rules of this version."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence

from data_prep.captions.duplicates import reject_duplicates
from data_prep.captions.judge import Limits, Verdict, judge, rules
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.request import Usage
from data_prep.captions.settings import RunSettings

_AT_A_TIME = 500
_VERDICT = "coalesce(reason, 'accepted')"
_JUDGED = "+state IN ('accepted', 'rejected')"  # in the order of places, without the index of states


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
    verdict = verdict_on(status, raw, language, settings.limits, _prompts(ledger, language))
    cost = settings.prices.of(verdict.usage, batch=batch) if settings.prices else None
    _commit(ledger, attempt, verdict, cost)
    return verdict, cost


def rejudge(
    ledger: RequestLedger, limits: Limits, *, dry_run: bool = False, tick: Callable[[], None] = lambda: None
) -> Counter[tuple[str, str]]:
    """Judge all answers of the ledger again, accepted ones and rejected ones. Sends nothing, and changes no cost.

    Returns what changed, as (verdict before, verdict now) → how many; a verdict is "accepted" or a reason.

    Args:
        dry_run: leave the ledger as it is.
    """
    ledger.db.execute(f"CREATE TEMP TABLE before AS SELECT place, {_VERDICT} AS verdict FROM request WHERE {_JUDGED}")
    try:
        if not dry_run:
            return _rejudge(ledger, limits, tick)
        with ledger.transaction():
            changed = _rejudge(ledger, limits, tick)
            raise _Undo
    except _Undo:
        return changed
    finally:
        ledger.db.execute("DROP TABLE before")


class _Undo(Exception):
    """Takes back what a dry run did."""


def _rejudge(ledger: RequestLedger, limits: Limits, tick: Callable[[], None]) -> Counter[tuple[str, str]]:
    last = 0
    while rows := _answered(ledger, last):
        last = rows[-1]["place"]
        with ledger.transaction() as db:
            for row in rows:
                verdict = judge(row["raw"], row["language"], limits, prompts=_prompts(ledger, row["language"]))
                if (verdict.caption, verdict.reason) != (row["caption"], row["reason"]):
                    _commit(ledger, row["attempt"], verdict, None)
                tick()
            db.executemany("UPDATE request SET rules = ? WHERE place = ?", [(rules(), row["place"]) for row in rows])
    reject_duplicates(ledger)  # one may have been that of a caption that is none any more
    changed = f"SELECT verdict, {_VERDICT}, count(*) FROM before JOIN request USING (place) GROUP BY 1, 2"
    return Counter({(old, new): count for old, new, count in ledger.db.execute(changed) if old != new})


def _answered(ledger: RequestLedger, after: int) -> list[sqlite3.Row]:
    """The next requests behind place `after` that have an answer to judge."""
    return ledger.db.execute(
        "SELECT place, language, reason, caption, attempt.id AS attempt, raw FROM request "
        "JOIN attempt ON attempt.id = (SELECT max(id) FROM attempt WHERE request = place) "
        f"WHERE {_JUDGED} AND status = 200 AND place > ? ORDER BY place LIMIT ?",
        (after, _AT_A_TIME),
    ).fetchall()


def by_other_rules(ledger: RequestLedger) -> dict[str, int]:
    """State → how many answers were accepted or rejected by other rules than those of this version."""
    found = ledger.db.execute(
        "SELECT state, count(*) FROM request WHERE state IN ('accepted', 'rejected') AND rules IS NOT ? "
        "AND coalesce(reason, '') NOT IN ('failed', 'declined') GROUP BY state",
        (rules(),),
    )
    return dict(found.fetchall())


def _commit(ledger: RequestLedger, attempt: int, verdict: Verdict, cost: float | None) -> None:
    ledger.judged(attempt, verdict.caption, verdict.reason, verdict.usage, cost, rules())


def _prompts(ledger: RequestLedger, language: str) -> list[str]:
    return [row["text"] for row in ledger.db.execute("SELECT text FROM prompt WHERE language = ?", (language,))]


def verdict_on(status: int, raw: bytes, language: str, limits: Limits, prompts: Sequence[str] = ()) -> Verdict:
    """The verdict on an answer of this status."""
    return judge(raw, language, limits, prompts=prompts) if status == 200 else Verdict(None, "declined", Usage())
