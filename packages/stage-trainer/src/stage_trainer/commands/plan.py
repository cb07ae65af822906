"""`stage-trainer plan`: memory, time and money of a recipe, before it runs."""

from __future__ import annotations

import argparse

from stage_trainer.commands.common import add_recipe, add_settings, say
from stage_trainer.errors import UserError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "plan",
        help="what fits, how long training takes and what it costs, before it runs",
        description="Plans a recipe's stages for given devices: which settings fit, memory by part, operations, "
        "where the time of a step goes, days and money, how many texts max_tokens cuts, and what each machine decodes, "
        "fetches, sends and writes. It needs neither a GPU nor "
        "the data; of data on this machine a sample is counted. It takes about a minute for each stage of a large "
        "model.",
    )
    add_recipe(p)
    p.add_argument("--stage", type=int, help="this stage alone (default: all)")
    p.add_argument("--gpus", type=int, default=1, help="how many devices, in data parallel (default: %(default)s)")
    p.add_argument("--gpu", default="h100-80gb", help="which, such as a100-40gb, or cpu (default: %(default)s)")
    p.add_argument("--memory", help="of one device, over what the table says, such as 24GiB")
    p.add_argument(
        "--peak", type=float, help="most dense operations a second of one device, over what the table says, as 165e12"
    )
    p.add_argument(
        "--bandwidth", type=float, help="of its memory, in bytes a second, over what the table says, as 1e12"
    )
    p.add_argument("--loader", type=float, help="images a second that are read for one device (default: enough)")
    p.add_argument("--cores", type=int, help="of a machine, of 8 devices or fewer: says whether decoding holds them up")
    p.add_argument(
        "--fetch", type=float, help="bytes a second that a machine can fetch, as 1e9: says whether that holds them up"
    )
    p.add_argument("--price", type=float, help="of one device for one hour, in any currency")
    p.add_argument("--mean-tokens", type=float, help="of a text (default: counted on the data, or half of max_tokens)")
    add_settings(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.measures import check_best_of
    from stage_trainer.recipe.read import load

    _check(arguments)
    recipe = load(arguments.recipe, arguments.settings, arguments.stage, ranks=arguments.gpus).recipe
    check_best_of(recipe, [arguments.stage] if arguments.stage else range(1, len(recipe.stages) + 1))
    say("loading PyTorch …")  # only now, so that mistakes are reported at once
    from stage_trainer.plan.devices import device
    from stage_trainer.plan.machines import machines_table
    from stage_trainer.plan.planner import Cluster, plan_stage
    from stage_trainer.plan.table import heading, stage_table
    from stage_trainer.weights import absent

    found = device(arguments.gpu, memory=arguments.memory, peak=arguments.peak, bandwidth=arguments.bandwidth)
    cluster = Cluster(found, arguments.gpus, arguments.price, arguments.loader)
    print(heading(recipe.name, recipe.precision, cluster), flush=True)
    for name in absent(recipe.model):
        say(f"{name} is not on this machine: its sizes are the recipe's, or else the towers' defaults")
    for number, stage in enumerate(recipe.stages, 1):
        if arguments.stage is None and stage.unplanned:
            print(f"\nstage {number} is not planned: {stage.unplanned}", flush=True)
        elif arguments.stage in (None, number):
            planned = plan_stage(recipe, number, cluster, mean_tokens=arguments.mean_tokens, say=say)
            print("\n" + stage_table(planned, cluster), flush=True)
            if carried := machines_table(recipe, planned, cluster, arguments.cores, arguments.fetch):
                print("\n" + carried, flush=True)


_RANGES = {
    "gpus": (1, 10**6, "devices, 1 to 1,000,000"),
    "peak": (1e9, 1e18, "operations a second, 1e9 to 1e18, such as 165e12"),
    "bandwidth": (1e6, 1e15, "bytes a second, 1e6 to 1e15, such as 1e12"),
    "loader": (1e-3, 1e9, "images a second, above 0 and up to 1e9"),
    "cores": (1, 10**5, "cores, 1 to 100,000"),
    "fetch": (1, 1e15, "bytes a second, 1 to 1e15, such as 1e9"),
    "price": (1e-6, 1e9, "a price above 0, up to 1e9"),
    "mean_tokens": (1, 1e9, "tokens of a text, at least 1"),
}


def _check(arguments: argparse.Namespace) -> None:
    for name, (low, high, expected) in _RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; expected {expected}")
