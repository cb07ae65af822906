"""`data-prep captions run`: send the planned requests, or estimate their cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_prep.commands import Subcommands
from data_prep.commands.captions.options import (
    add_checks,
    add_service,
    prices_of,
    service_of,
    settings_of,
    show_rejected,
)
from data_prep.commands.captions.status import show_spent

if TYPE_CHECKING:
    from data_prep.captions.ledger import RequestLedger
    from data_prep.captions.pricing import Prices
    from data_prep.captions.run import RunResult


def add(steps: Subcommands) -> None:
    run = steps.add_parser(
        "run",
        help="send the planned requests",
        description="Sends the planned requests as fast as the service allows and checks the answers. Ctrl-C once: "
        "waits for calls under way; twice: stops at once.",
    )
    add_service(run)
    run.add_argument("--dry-run", action="store_true", help="send nothing; estimate the cost of the rest")
    run.add_argument("--limit", type=int, metavar="N", help="send at most N requests")
    run.add_argument("--concurrency", type=int, default=64, metavar="N", help="concurrent calls at most (default: 64)")
    run.add_argument("--requests-per-minute", type=float, metavar="N")
    run.add_argument("--tokens-per-minute", type=float, metavar="N")
    run.add_argument(
        "--tries",
        type=int,
        default=6,
        metavar="N",
        help="failures of a request before it is left for the next run (default: 6)",
    )
    run.add_argument(
        "--resend",
        action="append",
        default=[],
        metavar="WHAT",
        help="first plan these again (and pay again): perhaps-paid, a reason of rejection (truncated, …) or a "
        "request's id; can be given several times",
    )
    add_checks(run)
    run.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from data_prep.captions.duplicates import reject_duplicates
    from data_prep.captions.ledger import RequestLedger
    from data_prep.captions.rate_limit import RateLimiter
    from data_prep.captions.run import run
    from data_prep.errors import UserError
    from data_prep.execute.progress import Progress

    ledger = RequestLedger(options.ledger)
    if options.dry_run:
        return _forecast(ledger, prices_of(options), options)
    settings = settings_of(options)
    limiter = RateLimiter(
        options.concurrency,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
    )
    service = service_of(options)
    for what in options.resend:
        with ledger.exclusive():
            print(f"{ledger.reopen(what)} planned again: {what}")
    (planned,) = ledger.db.execute("SELECT count(*) FROM request WHERE state = 'planned'").fetchone()
    progress, shown = Progress(max(1, planned if options.limit is None else min(planned, options.limit))), 0

    def tick(result: RunResult) -> None:
        nonlocal shown
        ended = result.accepted + sum(result.rejected.values()) + result.lost
        if ended > shown:
            shown = ended
            progress.add(1)

    def log(line: str) -> None:
        progress.clear()
        print(line)

    result = run(ledger, service, limiter, settings, tick=tick, log=log)
    progress.finish()
    with ledger.exclusive():
        duplicates = reject_duplicates(ledger)
    _show(result, duplicates, ledger)
    if settings.prices:
        print(f"spent, at most: {ledger.spent():.4f}")
    if result.stopped:
        raise UserError(f"stopped: {result.stopped}; run the command again to continue")
    return 0


def _show(result: RunResult, duplicates: int, ledger: RequestLedger) -> None:
    """Print what a run did."""
    print(f"asked {result.asked} times; accepted {result.accepted - duplicates}")
    show_rejected(result.rejected, duplicates)
    if result.not_done:
        print(f"  declined for now and asked again later (429, 5xx, no connection): {result.not_done}")
    if result.later:
        print(f"  met too many failures and stay planned: {result.later}")
    if result.lost:
        print(f"  perhaps paid, the connection broke: {result.lost}; see `data-prep captions status {ledger.path}`")


def _forecast(ledger: RequestLedger, prices: Prices | None, options: argparse.Namespace) -> int:
    from data_prep.captions.forecast import forecast

    found = forecast(ledger, prices, image_tokens=options.image_tokens)
    basis = f"from {found.measured} answers in the ledger" if found.measured else "at most, from a sample of images"
    print(f"{found.requests} requests planned; nothing was sent")
    print(f"{found.prompt_tokens:,.0f} tokens in, {found.completion_tokens:,.0f} out ({basis})")
    if found.cost is None:
        print("give --price-in and --price-out (per million tokens) for the cost")
    else:
        batches = found.cost * options.batch_factor
        print(f"cost: {found.cost:,.2f}; as batches {batches:,.2f}")
    show_spent(ledger)
    return 0
