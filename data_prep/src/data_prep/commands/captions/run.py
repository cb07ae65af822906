"""`data-prep captions run`: ask for what is planned, or say what it would cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_checks, add_money, add_service, limits_of, prices_of, service_of, show_rejected
from .status import show_spent

if TYPE_CHECKING:
    from ...captions.ledger import Ledger
    from ...captions.money import Prices


def add(steps: argparse._SubParsersAction) -> None:
    """Register the step."""
    run = steps.add_parser(
        "run",
        help="ask for what is planned",
        description="Asks for what is planned, as fast as the service lets it, and checks what comes. Ctrl-C once: "
        "what is under way is waited for; twice: at once.",
    )
    run.add_argument("ledger", metavar="LEDGER")
    add_service(run)
    add_money(run)
    run.add_argument("--dry-run", action="store_true", help="ask nothing; say what the rest would cost")
    run.add_argument("--limit", type=int, metavar="N", help="ask at most N times")
    run.add_argument("--concurrency", type=int, default=64, metavar="N", help="calls at a time, at most (default: 64)")
    run.add_argument("--requests-per-minute", type=float, metavar="N")
    run.add_argument("--tokens-per-minute", type=float, metavar="N")
    run.add_argument("--tries", type=int, default=6, metavar="N", help="failures a request may meet (default: 6)")
    run.add_argument(
        "--resend",
        action="append",
        default=[],
        metavar="WHAT",
        help="first plan again, and pay again: perhaps-paid, a reason of rejection (truncated, …) or a request's id; "
        "can be given several times",
    )
    add_checks(run)
    run.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from ...captions.duplicates import reject_duplicates
    from ...captions.ledger import Ledger
    from ...captions.pace import Pace
    from ...captions.run import Receipt, RunSettings, run
    from ...errors import UserError
    from ...execute.progress import Progress

    ledger, prices = Ledger(options.ledger), prices_of(options)
    if options.dry_run:
        return _forecast(ledger, prices, options)
    settings = RunSettings(
        limit=options.limit,
        tries=options.tries,
        budget=options.budget,
        prices=prices,
        image_tokens=options.image_tokens,
        limits=limits_of(options),
    )
    pace = Pace(
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

    def tick(receipt: Receipt) -> None:
        nonlocal shown
        ended = receipt.accepted + sum(receipt.rejected.values()) + receipt.lost
        if ended > shown:
            shown = ended
            progress.add(1)

    def say(line: str) -> None:
        progress.clear()
        print(line)

    receipt = run(ledger, service, pace, settings, tick=tick, say=say)
    progress.finish()
    with ledger.exclusive():
        duplicates = reject_duplicates(ledger)
    print(f"asked {receipt.asked} times; accepted {receipt.accepted - duplicates}")
    show_rejected(receipt.rejected, duplicates)
    if receipt.not_done:
        print(f"  declined for now and asked again later (429, 5xx, no connection): {receipt.not_done}")
    if receipt.later:
        print(f"  met too many failures and stay planned: {receipt.later}")
    if receipt.lost:
        print(f"  perhaps paid, the connection broke: {receipt.lost}; see `data-prep captions status {options.ledger}`")
    if prices:
        print(f"spent, at most: {ledger.spent():.4f}")
    if receipt.stopped:
        raise UserError(f"stopped: {receipt.stopped}; the ledger goes on from here")
    return 0


def _forecast(ledger: Ledger, prices: Prices | None, options: argparse.Namespace) -> int:
    from ...captions.forecast import forecast

    found = forecast(ledger, prices, image_tokens=options.image_tokens)
    basis = f"from {found.measured} answers in the ledger" if found.measured else "at most, from a sample of images"
    print(f"{found.requests} requests planned; nothing was sent")
    print(f"{found.prompt_tokens:,.0f} tokens in, {found.completion_tokens:,.0f} out ({basis})")
    if found.cost is None:
        print("give --price-in and --price-out (per million tokens) for money")
    else:
        batches = found.cost * options.batch_factor
        print(f"cost: {found.cost:,.2f}; as batches {batches:,.2f}")
    show_spent(ledger)
    return 0
