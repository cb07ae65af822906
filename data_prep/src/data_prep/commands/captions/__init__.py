"""`data-prep captions`: long captions by a vision model, with a ledger, so that nothing is paid for twice."""

from __future__ import annotations

from data_prep.commands import Subcommands
from data_prep.commands.captions.ledger import add_export, add_plan, add_rejudge, add_status
from data_prep.commands.captions.sending import add_batch, add_run


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "captions",
        help="make long captions in thirty languages with a vision model",
        description="Asks an OpenAI-compatible service (OpenAI's own, or vLLM on your machines) to describe images. "
        "Requests and answers are stored in LEDGER, one SQLite file: these commands can be killed and started again at "
        "any time, and nothing is paid for twice.",
    )
    steps = parser.add_subparsers(required=True, metavar="STEP")
    for add_step in (add_plan, add_run, add_status, add_rejudge, add_export, add_batch):
        add_step(steps)
