"""`data-prep captions plan` and `unplan`: add requests to the ledger, and remove them."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands
from data_prep.commands.execution import made


def add(steps: Subcommands) -> None:
    plan = steps.add_parser(
        "plan",
        help="plan which images to describe, and how",
        description="Adds a request to LEDGER for each image of SHARDS and each language; what is there stays.",
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
    import json
    from pathlib import Path

    from data_prep.captions.ledger import RequestLedger
    from data_prep.captions.plan import Plan, plan
    from data_prep.captions.texts import PROMPTS, check_languages
    from data_prep.errors import UserError
    from data_prep.execute.progress import Progress
    from data_prep.shards import Dataset

    try:
        body = json.loads(options.body)
    except ValueError as error:
        raise UserError(f"--body {options.body!r} is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"--body {options.body!r}: expected a JSON object")
    wanted = made(Plan, options, languages=check_languages(options.languages), body=body)
    prompts = Path(options.prompts) if options.prompts else PROMPTS
    progress = Progress(max(1, sum(len(Dataset.open(directory)) for directory in options.shards)))
    ledger = RequestLedger(options.ledger, create=True)
    done = plan(ledger, options.shards, wanted, prompts=prompts, tick=lambda: progress.add(1))
    progress.finish()
    print(f"{done.images} different images ({done.twice} more occurred again)")
    print(f"{done.new} requests planned, {done.known} were in {options.ledger} before")
    return 0


def _unplan(options: argparse.Namespace) -> int:
    from pathlib import Path

    from data_prep.captions.ledger import RequestLedger
    from data_prep.captions.texts import check_languages

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
