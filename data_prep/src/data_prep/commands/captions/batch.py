"""`data-prep captions batch`: the same requests through the Batch API."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands
from data_prep.commands.captions.options import add_checks, add_service, service_of, settings_of, show_rejected


def add(steps: Subcommands) -> None:
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
    from data_prep.captions.ledger import RequestLedger

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

    from data_prep.captions.batch import collect
    from data_prep.captions.duplicates import reject_duplicates
    from data_prep.captions.ledger import RequestLedger
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
    show_rejected(found.rejected, duplicates)
    print(f"  not answered and planned again: {found.planned_again}")
    if found.unknown:
        print(f"  answers to requests that are not in this ledger: {found.unknown}")
    for note in found.notes:
        print(f"  {note}")
    return 0
