"""`data-prep captions run` and `batch`: send the planned requests, one by one or through the Batch API."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from data_prep.captions.images import list_unusable
from data_prep.captions.judge import Limits
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.pricing import Prices, forecast
from data_prep.captions.service import Service
from data_prep.captions.settings import RunResult, RunSettings
from data_prep.commands import Subcommands
from data_prep.commands.captions.ledger import add_checks, show_spent
from data_prep.errors import UserError


def add_run(steps: Subcommands) -> None:
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
        help="failures of a request before it is set aside, or left for the next run if the service answered nothing "
        "meanwhile (default: 6)",
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
    from data_prep.captions.rate_limit import RateLimiter
    from data_prep.captions.run import run
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
        ended = result.accepted + sum(result.rejected.values()) + result.lost + result.failed
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
    """Print what a run did, and list the images that it could not use."""
    unusable = list_unusable(ledger.path, "run", result.unusable)
    print(f"asked {result.asked} times; accepted {result.accepted - duplicates}")
    show_rejected(result.rejected, duplicates, ledger)
    if result.not_done:
        print(f"  declined for now and asked again later (429, 5xx, no connection): {result.not_done}")
    if result.failed:
        print(f"  rejected, failed: {result.failed}, set aside; `data-prep captions status {ledger.path}` lists them")
    if result.later:
        print(f"  met too many failures and stay planned: {result.later}")
    if result.unreadable:
        print(
            f"  not sent and stay planned, as their images cannot be used: {result.unreadable}; {unusable} lists them"
        )
    if result.lost:
        print(f"  perhaps paid, the connection broke: {result.lost}; see `data-prep captions status {ledger.path}`")


def _forecast(ledger: RequestLedger, prices: Prices | None, options: argparse.Namespace) -> int:
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


def add_batch(steps: Subcommands) -> None:
    batch = steps.add_parser("batch", help="the Batch API: half the price, answers within a day")
    parts = batch.add_subparsers(required=True, metavar="STEP")
    submit = parts.add_parser("submit", help="send the planned requests as batches")
    add_service(submit)
    submit.add_argument("--limit", type=int, metavar="N", help="at most N requests")
    submit.add_argument("--requests-per-file", type=int, default=50_000, metavar="N", help="(default: 50000)")
    submit.add_argument("--megabytes-per-file", type=float, default=200, metavar="N", help="(default: 200)")
    submit.set_defaults(run=_submit)
    collect = parts.add_parser("collect", help="collect the answers of batches that have ended")
    add_service(collect)
    add_checks(collect)
    collect.set_defaults(run=_collect)


def _submit(options: argparse.Namespace) -> int:
    import asyncio

    from data_prep.captions.batch import submit

    batches, requests = asyncio.run(
        submit(
            RequestLedger(options.ledger),
            service_of(options),
            settings_of(options),
            most_requests=options.requests_per_file,
            most_bytes=int(options.megabytes_per_file * 1e6),
            tick=lambda requests: print(f"{requests} requests sent", flush=True),
        )
    )
    print(
        f"{requests} requests in {batches} batches; collect the answers with `data-prep captions batch collect "
        f"{options.ledger}`"
    )
    return 0


def _collect(options: argparse.Namespace) -> int:
    import asyncio

    from data_prep.captions.collect import collect
    from data_prep.captions.duplicates import reject_duplicates
    from data_prep.execute.progress import Progress

    ledger = RequestLedger(options.ledger)
    (waiting,) = ledger.db.execute(
        "SELECT count(*) FROM request WHERE state = 'sent' AND batch IN "
        "(SELECT id FROM batch WHERE state IN ('open', 'creating'))"
    ).fetchone()
    progress = Progress(max(1, waiting))
    found = asyncio.run(collect(ledger, service_of(options), settings_of(options), tick=lambda: progress.add(1)))
    progress.finish()
    with ledger.exclusive():
        duplicates = reject_duplicates(ledger)
    print(f"{found.ended} batches ended, {found.open} running; accepted {found.accepted - duplicates}")
    show_rejected(found.rejected, duplicates, ledger)
    print(f"  not answered and planned again: {found.planned_again}")
    if found.lost:
        print(f"  perhaps paid, without an answer: {found.lost}; see `data-prep captions status {ledger.path}`")
    if found.unknown:
        print(f"  answers to requests that are not in this ledger: {found.unknown}")
    for note in found.notes:
        print(f"  {note}")
    if found.failed:
        raise UserError(f"{len(found.failed)} batches could not be collected now; {'; '.join(found.failed[:3])}")
    return 0


def add_service(parser: argparse.ArgumentParser) -> None:
    """Add LEDGER and the options for the service, its key, its prices and the budget."""
    parser.add_argument("ledger", metavar="LEDGER")
    parser.add_argument("--url", help="base URL of the service, with /v1 (default: OPENAI_BASE_URL, else OpenAI's)")
    parser.add_argument(
        "--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=180, metavar="SECONDS", help="for an answer (default: 180)")
    parser.add_argument("--price-in", type=float, metavar="X", help="price of a million tokens sent")
    parser.add_argument("--price-out", type=float, metavar="X", help="price of a million tokens answered")
    parser.add_argument(
        "--batch-factor", type=float, default=0.5, metavar="X", help="a batch's share of it (default: 0.5)"
    )
    parser.add_argument("--budget", type=float, metavar="X", help="the cost of this ledger at most; stops before it")
    parser.add_argument(
        "--image-tokens", type=int, metavar="N", help="tokens of an image, if the model's rule is known"
    )


def service_of(options: argparse.Namespace) -> Service:
    """The service that the user named. UserError if there is no key for it."""
    return Service(options.url, key_variable=options.key_env, timeout=options.timeout)


def prices_of(options: argparse.Namespace) -> Prices | None:
    """The prices that the user gave, if any. UserError if one of the two is missing."""
    if (options.price_in is None) != (options.price_out is None):
        raise UserError("--price-in and --price-out belong together; give both")
    if options.price_in is None:
        return None
    return Prices(options.price_in, options.price_out, options.batch_factor)


def settings_of(options: argparse.Namespace) -> RunSettings:
    """The user's settings. UserError if they contradict each other."""
    own = vars(options)
    return RunSettings(
        limit=own.get("limit"),
        tries=own.get("tries", RunSettings.tries),
        budget=options.budget if "limit" in own else None,  # `collect` sends nothing
        prices=prices_of(options),
        image_tokens=options.image_tokens,
        limits=Limits(options.shortest, options.longest) if "shortest" in own else Limits(),
    )


def show_rejected(rejected: Mapping[str, int], duplicates: int, ledger: RequestLedger) -> None:
    """Print how many captions were rejected, by reason, and where they are listed."""
    for reason, count in sorted({**rejected, "duplicate": duplicates}.items()):
        if count:
            print(f"  rejected, {reason}: {count}")
    if rejected or duplicates:
        print(f"  `data-prep captions status {ledger.path}` lists what was rejected")
