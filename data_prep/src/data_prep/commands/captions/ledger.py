"""`data-prep captions plan`, `unplan`, `status`, `rejudge` and `export`: what is done with the ledger alone."""

from __future__ import annotations

import argparse
import datetime
from itertools import islice
from pathlib import Path

from data_prep.captions.faults import error_message
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.texts import PROMPTS, check_languages
from data_prep.commands import Subcommands
from data_prep.commands.execution import add_samples_per_shard, made
from data_prep.curation.tokens import TokenCounter
from data_prep.errors import UserError
from data_prep.shards import Dataset
from data_prep.shards.format import parse_json

_LISTED = 20


def add_plan(steps: Subcommands) -> None:
    plan = steps.add_parser(
        "plan",
        help="plan which images to describe, and how",
        description="Adds a request to LEDGER for each image of SHARDS and each language; what is there stays. "
        "Killed on the way, the same command goes on where it was.",
    )
    plan.add_argument("ledger", metavar="LEDGER", help="SQLite file; created if there is none")
    plan.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="data sets of images, as `data-prep import` writes them"
    )
    plan.add_argument("--model", required=True, help="its name at the service")
    plan.add_argument(
        "--languages", nargs="+", default=["all"], metavar="XX", help="codes, or all (default: all thirty)"
    )
    plan.add_argument("--prompt-version", default="v1", metavar="V", help="folder of prompts (default: v1)")
    plan.add_argument("--prompts", metavar="DIR", help="folder V/XX.txt of prompts of your own")
    plan.add_argument("--max-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    plan.add_argument("--detail", choices=("low", "high", "auto"), help="of the image (default: not sent)")
    plan.add_argument(
        "--body", default="{}", metavar="JSON", help="""more fields of the request: '{"temperature": 0.2}'"""
    )
    plan.add_argument("--images", type=int, metavar="N", help="draw N images (default: all)")
    plan.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    plan.set_defaults(run=_plan)

    unplan = steps.add_parser(
        "unplan",
        help="remove planned requests that were never sent",
        description="Removes requests that were never sent from LEDGER, all of them or those that the options select. "
        "Requests that were sent even once stay as they are.",
    )
    unplan.add_argument("ledger", metavar="LEDGER")
    unplan.add_argument("shards", metavar="SHARDS", nargs="*", help="of images in these data sets (default: all)")
    unplan.add_argument("--languages", nargs="+", default=["all"], metavar="XX", help="in these (default: all)")
    unplan.add_argument("--model", help="of this model (default: all)")
    unplan.add_argument("--prompt-version", metavar="V", help="with prompts of this version (default: all)")
    unplan.set_defaults(run=_unplan)


def _plan(options: argparse.Namespace) -> int:
    from data_prep.captions.images import list_unusable
    from data_prep.captions.plan import Plan, passes, plan
    from data_prep.execute.progress import Progress

    try:
        body = parse_json(options.body)
    except ValueError as error:
        raise UserError(f"--body {options.body[:80]!r} is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"--body {options.body[:80]!r}: expected a JSON object")
    wanted = made(Plan, options, languages=check_languages(options.languages), body=body)
    prompts = Path(options.prompts) if options.prompts else PROMPTS
    images = sum(len(Dataset.open(directory)) for directory in options.shards)
    progress = Progress(max(1, images * passes(wanted)))
    ledger = RequestLedger(options.ledger, create=True)

    def tick(new: bool) -> None:
        progress.add(1, new=new)

    done = plan(ledger, options.shards, wanted, prompts=prompts, tick=tick)
    progress.finish()
    print(f"{done.images} different images ({done.twice} more occurred again)")
    print(f"{done.new} requests planned, {done.known} were in {options.ledger} before")
    if path := list_unusable(ledger.path, "plan", done.unreadable):
        print(f"{len(done.unreadable)} images cannot be read and are left out; {path} lists them:")
        for why in islice(done.unreadable.values(), _LISTED):
            print(f"  {why}")
    return 0


def _unplan(options: argparse.Namespace) -> int:
    ledger = RequestLedger(options.ledger)
    with ledger.exclusive():
        taken, asked = ledger.unplan(
            datasets=[str(Path(directory).resolve()) for directory in options.shards],
            languages=check_languages(options.languages),
            model=options.model,
            prompt_version=options.prompt_version,
        )
    print(f"{taken} requests removed from the plan")
    if asked:
        print(f"{asked} stay planned: they were sent before")
    return 0


def add_status(steps: Subcommands) -> None:
    status = steps.add_parser("status", help="show what was sent, answered, rejected, lost, spent")
    status.add_argument("ledger", metavar="LEDGER")
    status.add_argument(
        "--all", action="store_true", help="list everything rejected, set aside or perhaps paid, not twenty of each"
    )
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
        print(f"rejected, {reason}: {count}; `captions run --resend {reason}` asks again")
        if reason in ("failed", "declined"):
            continue  # by image, below
        for row in ledger.db.execute(
            "SELECT id, language FROM request WHERE state = 'rejected' AND reason = ? LIMIT ?",
            (reason, -1 if options.all else 20),
        ):
            print(f"  {row['id']}  {row['language']}")
    _show_trouble(ledger, everything=options.all)
    for row in ledger.db.execute("SELECT * FROM batch ORDER BY id"):
        print(f"batch {row['remote'] or row['name']}: {row['state']}{' (' + row['note'] + ')' if row['note'] else ''}")
    show_spent(ledger)
    _show_other_rules(ledger)
    lost = ledger.perhaps_paid()
    if lost:
        print(f"perhaps paid (or under way, if a run is): {len(lost)}; `captions run --resend perhaps-paid` asks again")
    for row in lost if options.all else lost[:_LISTED]:
        sent = datetime.datetime.fromtimestamp(row["sent_at"]).isoformat(" ", "seconds")
        print(f"  {row['id']}  {row['language']}  sent {sent}  {row['note'] or 'no answer when the run was killed'}")
    return 0


def _show_trouble(ledger: RequestLedger, *, everything: bool) -> None:
    """Print the images whose requests failed or were declined, and what the service said last."""
    images = ledger.in_trouble()
    if images:
        print("set aside; `captions run --resend failed` or `--resend declined` asks again:")
    for row in images if everything else images[:_LISTED]:
        said = row["note"] or (error_message(row["raw"]) if row["raw"] else "")
        what = f"{row['requests']} {row['reason']}, status {row['status']}: {said}"
        print(f"  image {row['number']} of {row['dataset']}: {what}")
    if len(images) > _LISTED and not everything:
        print(f"  and {len(images) - _LISTED} more images; --all lists them")


def _show_other_rules(ledger: RequestLedger) -> None:
    """Print how many answers another version of this program judged."""
    from data_prep.captions.verdicts import by_other_rules

    if found := by_other_rules(ledger):
        counts = " and ".join(f"{count} {state}" for state, count in sorted(found.items()))
        print(
            f"{counts} by the rules of another version; `data-prep captions rejudge {ledger.path}` judges them again, "
            "without a request"
        )


def add_rejudge(steps: Subcommands) -> None:
    rejudge = steps.add_parser(
        "rejudge",
        help="judge the answers again, by the rules of this version",
        description="Judges all answers in LEDGER again, accepted and rejected ones, and prints what changes. Sends "
        "nothing and costs nothing. Give the --shortest and --longest of your runs.",
    )
    rejudge.add_argument("ledger", metavar="LEDGER")
    rejudge.add_argument("--dry-run", action="store_true", help="change nothing, print what would change")
    add_checks(rejudge)
    rejudge.set_defaults(run=_rejudge)


def add_checks(parser: argparse.ArgumentParser) -> None:
    """Add the options for the length of a caption."""
    parser.add_argument("--shortest", type=int, default=200, metavar="N", help="characters of a caption (default: 200)")
    parser.add_argument("--longest", type=int, default=6000, metavar="N", help="(default: 6000)")


def _rejudge(options: argparse.Namespace) -> int:
    from data_prep.captions.judge import Limits
    from data_prep.captions.verdicts import rejudge
    from data_prep.execute.progress import Progress

    ledger, limits = RequestLedger(options.ledger), Limits(options.shortest, options.longest)
    with ledger.exclusive():
        (answers,) = ledger.db.execute(
            "SELECT count(*) FROM request WHERE state IN ('accepted', 'rejected')"
        ).fetchone()
        progress = Progress(max(1, answers))
        changed = rejudge(ledger, limits, dry_run=options.dry_run, tick=lambda: progress.add(1))
    progress.finish()
    would = " would be" if options.dry_run else ""
    print(f"{sum(changed.values())} verdicts{would} changed; nothing was sent")
    for (before, now), count in sorted(changed.items()):
        names = [one if one == "accepted" else f"rejected, {one}" for one in (before, now)]
        print(f"  {names[0]} -> {names[1]}: {count}")
    return 0


def add_export(steps: Subcommands) -> None:
    export = steps.add_parser(
        "export",
        help="write accepted captions as a data set of images with long captions",
        description="Writes the images with their accepted captions to OUT. Images that cannot be read, or changed "
        "since they were described, are left out and listed in OUT/dropped.jsonl; the exit status is then 2.",
    )
    export.add_argument("ledger", metavar="LEDGER")
    export.add_argument("out", metavar="OUT", help="folder of the data set; must not exist")
    export.add_argument("--source", default="synthetic", metavar="NAME", help="source's name (default: synthetic)")
    export.add_argument(
        "--tokenizer", metavar="PATH", help="count tokens with this sentencepiece model or tokenizer.json"
    )
    add_samples_per_shard(export)
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from data_prep.captions.duplicates import reject_duplicates
    from data_prep.captions.export import export
    from data_prep.execute.progress import Progress

    ledger = RequestLedger(options.ledger)
    with ledger.exclusive():
        reject_duplicates(ledger)
        (images,) = ledger.db.execute("SELECT count(DISTINCT image) FROM request WHERE state = 'accepted'").fetchone()
        progress = Progress(max(1, images))
        done = export(
            ledger,
            options.out,
            source=options.source,
            tokenizer=TokenCounter(options.tokenizer) if options.tokenizer else None,
            samples_per_shard=options.samples_per_shard,
            tick=lambda: progress.add(1),
        )
    progress.finish()
    _show_other_rules(ledger)
    print(f"{options.out}: {done.captions.total()} captions")
    print(", ".join(f"{language} {count}" for language, count in sorted(done.captions.items())))
    if done.left_out:
        place = Path(options.out) / "dropped.jsonl"
        raise UserError(
            f"{done.left_out} images were left out, as they cannot be read or changed since they were described: "
            f"{place} lists each; their captions stay in the ledger"
        )
    return 0
