"""`data-prep captions status`: the state of the ledger."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_prep.commands import Subcommands

if TYPE_CHECKING:
    from data_prep.captions.ledger import RequestLedger


def add(steps: Subcommands) -> None:
    status = steps.add_parser("status", help="show what was sent, answered, rejected, lost, spent")
    status.add_argument("ledger", metavar="LEDGER")
    status.add_argument("--all", action="store_true", help="list every request that was perhaps paid, not twenty")
    status.set_defaults(run=_status)


def show_spent(ledger: RequestLedger) -> None:
    """Print the cost of the ledger so far, and what is not in it."""
    print(f"spent, at most: {ledger.spent():.4f}")
    (unpriced,) = ledger.db.execute("SELECT count(*) FROM attempt WHERE cost IS NULL").fetchone()
    if unpriced:
        print(
            f"  and {unpriced} attempts made without prices; `captions run` with --price-in and --price-out counts them"
        )


def _status(options: argparse.Namespace) -> int:
    import datetime

    from data_prep.captions.ledger import RequestLedger

    ledger = RequestLedger(options.ledger)
    columns = ("planned", "sent", "received", "accepted", "rejected")
    table: dict[str, dict[str, int]] = {}
    for language, state, count in ledger.db.execute("SELECT language, state, count(*) FROM request GROUP BY 1, 2"):
        table.setdefault(language, {})[state] = count
    print("language" + "".join(f"{column:>10}" for column in columns))
    for language, counts in sorted(table.items()):
        print(f"{language:8}" + "".join(f"{counts.get(column, 0):>10}" for column in columns))
    print(f"{'all':8}" + "".join(f"{sum(row.get(column, 0) for row in table.values()):>10}" for column in columns))
    for reason, count in ledger.db.execute(
        "SELECT reason, count(*) FROM request WHERE state = 'rejected' GROUP BY 1 ORDER BY 2 DESC, 1"
    ):
        print(f"rejected, {reason}: {count}")
    for row in ledger.db.execute("SELECT * FROM batch ORDER BY id"):
        print(f"batch {row['remote'] or row['name']}: {row['state']}{' (' + row['note'] + ')' if row['note'] else ''}")
    show_spent(ledger)
    lost = ledger.perhaps_paid()
    if lost:
        print(f"perhaps paid (or under way, if a run is): {len(lost)}; `captions run --resend perhaps-paid` asks again")
    for row in lost if options.all else lost[:20]:
        sent = datetime.datetime.fromtimestamp(row["sent_at"]).isoformat(" ", "seconds")
        print(f"  {row['id']}  {row['language']}  sent {sent}  {row['note'] or 'no answer when the run was killed'}")
    return 0
