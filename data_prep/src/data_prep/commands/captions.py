"""`data-prep captions`: long captions by a vision model, with a ledger that never pays twice."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..captions.money import Prices
    from ..captions.service import Service


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "captions",
        help="make long captions in thirty languages with a vision model",
        description="Asks an OpenAI-compatible service (OpenAI's own, or vLLM on your machines) to describe images. "
        "Everything asked and answered stands in LEDGER, one SQLite file: kill any of these commands whenever you like "
        "and start it again, nothing is paid for twice.",
    )
    parts = parser.add_subparsers(required=True, metavar="STEP")
    _add_plan(parts)
    _add_run(parts)
    _add_status(parts)
    _add_export(parts)
    _add_batch(parts)


def _add_plan(parts: argparse._SubParsersAction) -> None:
    plan = parts.add_parser(
        "plan",
        help="say which images are to be described, and how",
        description="Adds a request to LEDGER for each image of SHARDS and each language; what is there stays.",
    )
    plan.add_argument("ledger", metavar="LEDGER", help="SQLite file; made if there is none")
    plan.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="data sets of images, as `data-prep import` writes them"
    )
    plan.add_argument("--model", required=True, help="as the service calls it")
    plan.add_argument(
        "--languages", nargs="+", default=["all"], metavar="XX", help="codes, or all (default: all thirty)"
    )
    plan.add_argument("--prompt-version", default="v1", metavar="V", help="folder of prompts (default: v1)")
    plan.add_argument("--prompts", metavar="DIR", help="folder V/XX.txt of prompts of your own")
    plan.add_argument("--max-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    plan.add_argument(
        "--detail", choices=("low", "high", "auto"), help="how closely the model looks (default: not said)"
    )
    plan.add_argument(
        "--body", default="{}", metavar="JSON", help="""more fields of the request: '{"temperature": 0.2}'"""
    )
    plan.add_argument("--images", type=int, metavar="N", help="draw N images (default: all)")
    plan.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    plan.set_defaults(run=_plan)


def _add_run(parts: argparse._SubParsersAction) -> None:
    run = parts.add_parser(
        "run",
        help="ask for what is planned",
        description="Asks for what is planned, as fast as the service lets it, and checks what comes. Ctrl-C once: "
        "what is under way is waited for; twice: at once.",
    )
    run.add_argument("ledger", metavar="LEDGER")
    _add_service(run)
    _add_money(run)
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
    _add_checks(run)
    run.set_defaults(run=_run)


def _add_status(parts: argparse._SubParsersAction) -> None:
    status = parts.add_parser("status", help="what was asked, answered, rejected, lost, spent")
    status.add_argument("ledger", metavar="LEDGER")
    status.add_argument("--all", action="store_true", help="list every request that was perhaps paid, not twenty")
    status.set_defaults(run=_status)


def _add_export(parts: argparse._SubParsersAction) -> None:
    export = parts.add_parser("export", help="write accepted captions as a data set of images with long captions")
    export.add_argument("ledger", metavar="LEDGER")
    export.add_argument("out", metavar="OUT", help="folder of the data set; must not exist")
    export.add_argument("--source", default="synthetic", metavar="NAME", help="source's name (default: synthetic)")
    export.add_argument(
        "--tokenizer", metavar="PATH", help="count tokens with this sentencepiece model or tokenizer.json"
    )
    export.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="(default: 1000)")
    export.set_defaults(run=_export)


def _add_batch(parts: argparse._SubParsersAction) -> None:
    batch = parts.add_parser("batch", help="the Batch API: half the price, answers within a day")
    steps = batch.add_subparsers(required=True, metavar="STEP")
    submit = steps.add_parser("submit", help="send what is planned as batches")
    submit.add_argument("ledger", metavar="LEDGER")
    _add_service(submit)
    _add_money(submit)
    submit.add_argument("--limit", type=int, metavar="N", help="at most N requests")
    submit.add_argument("--requests-per-file", type=int, default=50_000, metavar="N", help="(default: 50000)")
    submit.add_argument("--megabytes-per-file", type=float, default=200, metavar="N", help="(default: 200)")
    submit.set_defaults(run=_submit)
    collect = steps.add_parser("collect", help="take the answers of batches that have ended")
    collect.add_argument("ledger", metavar="LEDGER")
    _add_service(collect)
    _add_money(collect)
    _add_checks(collect)
    collect.set_defaults(run=_collect)


def _add_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="base URL of the service, with /v1 (default: OPENAI_BASE_URL, else OpenAI's)")
    parser.add_argument(
        "--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=180, metavar="SECONDS", help="for an answer (default: 180)")


def _add_money(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--price-in", type=float, metavar="X", help="price of a million tokens sent")
    parser.add_argument("--price-out", type=float, metavar="X", help="price of a million tokens answered")
    parser.add_argument(
        "--batch-factor", type=float, default=0.5, metavar="X", help="a batch's share of it (default: 0.5)"
    )
    parser.add_argument("--budget", type=float, metavar="X", help="what this ledger may cost in all; stops before it")
    parser.add_argument(
        "--image-tokens", type=int, metavar="N", help="tokens of an image, if the model's rule is known"
    )


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shortest", type=int, default=200, metavar="N", help="characters of a caption (default: 200)")
    parser.add_argument("--longest", type=int, default=6000, metavar="N", help="(default: 6000)")


def _plan(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from ..captions.ledger import Ledger
    from ..captions.plan import Plan, plan
    from ..captions.texts import PROMPTS, check_languages
    from ..errors import UserError
    from ..execute.progress import Progress
    from ..shards import Dataset

    try:
        body = json.loads(options.body)
    except ValueError as error:
        raise UserError(f"--body {options.body!r} is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"--body {options.body!r}: expected a JSON object")
    wanted = Plan(
        model=options.model,
        languages=tuple(check_languages(options.languages)),
        prompt_version=options.prompt_version,
        max_tokens=options.max_tokens,
        detail=options.detail,
        body=body,
        images=options.images,
        seed=options.seed,
    )
    prompts = Path(options.prompts) if options.prompts else PROMPTS
    progress = Progress(max(1, sum(len(Dataset.open(directory)) for directory in options.shards)))
    ledger = Ledger(options.ledger, create=True)
    done = plan(ledger, options.shards, wanted, prompts=prompts, tick=lambda: progress.add(1))
    progress.finish()
    print(f"{done.images} different images ({done.twice} more occurred again)")
    print(f"{done.new} requests planned, {done.known} were in {options.ledger} before")
    return 0


def _run(options: argparse.Namespace) -> int:
    from ..captions.duplicates import reject_duplicates
    from ..captions.judge import Limits
    from ..captions.ledger import Ledger
    from ..captions.pace import Pace
    from ..captions.run import Receipt, RunSettings, run
    from ..errors import UserError
    from ..execute.progress import Progress

    ledger, prices = Ledger(options.ledger), _prices(options)
    if options.dry_run:
        return _forecast(ledger, prices, options)
    settings = RunSettings(
        limit=options.limit,
        tries=options.tries,
        budget=options.budget,
        prices=prices,
        image_tokens=options.image_tokens,
        limits=Limits(options.shortest, options.longest),
    )
    pace = Pace(
        options.concurrency,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
    )
    service = _service(options)
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

    receipt = run(ledger, service, pace, settings, tick=tick, say=print)
    progress.finish()
    with ledger.exclusive():
        duplicates = reject_duplicates(ledger)
    print(f"asked {receipt.asked} times; accepted {receipt.accepted - duplicates}")
    for reason, count in sorted({**receipt.rejected, "duplicate": duplicates}.items()):
        if count:
            print(f"  rejected, {reason}: {count}")
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


def _forecast(ledger: Any, prices: Prices | None, options: argparse.Namespace) -> int:
    from ..captions.forecast import forecast

    found = forecast(ledger, prices, image_tokens=options.image_tokens)
    basis = f"from {found.measured} answers in the ledger" if found.measured else "at most, from a sample of images"
    print(f"{found.requests} requests planned; nothing was sent")
    print(f"{found.prompt_tokens:,.0f} tokens in, {found.completion_tokens:,.0f} out ({basis})")
    if found.cost is None:
        print("give --price-in and --price-out (per million tokens) for money")
    else:
        batches = found.cost * options.batch_factor
        print(f"cost: {found.cost:,.2f}; as batches {batches:,.2f}; spent so far {ledger.spent():,.2f}")
    return 0


def _status(options: argparse.Namespace) -> int:
    import datetime

    from ..captions.ledger import Ledger

    ledger = Ledger(options.ledger)
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
    print(f"spent, at most: {ledger.spent():.4f}")
    lost = ledger.perhaps_paid()
    if lost:
        print(f"perhaps paid (or under way, if a run is): {len(lost)}; `captions run --resend perhaps-paid` asks again")
    for row in lost if options.all else lost[:20]:
        sent = datetime.datetime.fromtimestamp(row["sent_at"]).isoformat(" ", "seconds")
        print(f"  {row['id']}  {row['language']}  sent {sent}  {row['note'] or 'no answer when the run was killed'}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ..captions.duplicates import reject_duplicates
    from ..captions.export import export
    from ..captions.ledger import Ledger
    from ..execute.progress import Progress
    from ..shaping.tokens import TokenCounter

    ledger = Ledger(options.ledger)
    with ledger.exclusive():
        reject_duplicates(ledger)
        (images,) = ledger.db.execute("SELECT count(DISTINCT image) FROM request WHERE state = 'accepted'").fetchone()
        progress = Progress(max(1, images))
        counts = export(
            ledger,
            options.out,
            source=options.source,
            tokenizer=TokenCounter(options.tokenizer) if options.tokenizer else None,
            samples_per_shard=options.samples_per_shard,
            tick=lambda: progress.add(1),
        )
    progress.finish()
    print(f"{options.out}: {sum(counts.values())} captions")
    print(", ".join(f"{language} {count}" for language, count in sorted(counts.items())))
    return 0


def _submit(options: argparse.Namespace) -> int:
    import asyncio

    from ..captions.batch import submit
    from ..captions.ledger import Ledger

    batches, requests = asyncio.run(
        submit(
            Ledger(options.ledger),
            _service(options),
            prices=_prices(options),
            budget=options.budget,
            image_tokens=options.image_tokens,
            limit=options.limit,
            most_requests=options.requests_per_file,
            most_bytes=int(options.megabytes_per_file * 1e6),
            tick=lambda requests: print(f"{requests} requests sent", flush=True),
        )
    )
    print(
        f"{requests} requests in {batches} batches; `data-prep captions batch collect {options.ledger}` takes answers"
    )
    return 0


def _collect(options: argparse.Namespace) -> int:
    import asyncio

    from ..captions.batch import collect
    from ..captions.duplicates import reject_duplicates
    from ..captions.judge import Limits
    from ..captions.ledger import Ledger

    ledger = Ledger(options.ledger)
    limits = Limits(options.shortest, options.longest)
    found = asyncio.run(collect(ledger, _service(options), prices=_prices(options), limits=limits))
    with ledger.exclusive():
        duplicates = reject_duplicates(ledger)
    print(f"{found.ended} batches ended, {found.open} at work; accepted {found.accepted - duplicates}")
    for reason, count in sorted({**found.rejected, "duplicate": duplicates}.items()):
        if count:
            print(f"  rejected, {reason}: {count}")
    print(f"  not answered and planned again: {found.planned_again}")
    if found.unknown:
        print(f"  answers to requests that are not in this ledger: {found.unknown}")
    for note in found.notes:
        print(f"  {note}")
    return 0


def _prices(options: argparse.Namespace) -> Prices | None:
    from ..captions.money import Prices
    from ..errors import UserError

    if (options.price_in is None) != (options.price_out is None):
        raise UserError("--price-in and --price-out belong together; give both")
    if options.price_in is None:
        return None
    return Prices(options.price_in, options.price_out, options.batch_factor)


def _service(options: argparse.Namespace) -> Service:
    from ..captions.service import Service

    return Service(options.url, key_variable=options.key_env, timeout=options.timeout)
