"""Options of several steps: the service, its prices, the limits of a caption."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.captions.pricing import Prices
    from data_prep.captions.run import RunSettings
    from data_prep.captions.service import Service


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
    from data_prep.captions.service import Service

    return Service(options.url, key_variable=options.key_env, timeout=options.timeout)


def prices_of(options: argparse.Namespace) -> Prices | None:
    """The prices that the user gave, if any. UserError if one of the two is missing."""
    from data_prep.captions.pricing import Prices
    from data_prep.errors import UserError

    if (options.price_in is None) != (options.price_out is None):
        raise UserError("--price-in and --price-out belong together; give both")
    if options.price_in is None:
        return None
    return Prices(options.price_in, options.price_out, options.batch_factor)


def add_checks(parser: argparse.ArgumentParser) -> None:
    """Add the options for the length of a caption."""
    parser.add_argument("--shortest", type=int, default=200, metavar="N", help="characters of a caption (default: 200)")
    parser.add_argument("--longest", type=int, default=6000, metavar="N", help="(default: 6000)")


def settings_of(options: argparse.Namespace) -> RunSettings:
    """The user's settings. UserError if they contradict each other."""
    from data_prep.captions.judge import Limits
    from data_prep.captions.run import RunSettings

    own = vars(options)
    return RunSettings(
        limit=own.get("limit"),
        tries=own.get("tries", RunSettings.tries),
        budget=options.budget if "limit" in own else None,  # `collect` sends nothing
        prices=prices_of(options),
        image_tokens=options.image_tokens,
        limits=Limits(options.shortest, options.longest) if "shortest" in own else Limits(),
    )


def show_rejected(rejected: Mapping[str, int], duplicates: int) -> None:
    """Print how many captions were rejected, by reason."""
    for reason, count in sorted({**rejected, "duplicate": duplicates}.items()):
        if count:
            print(f"  rejected, {reason}: {count}")
