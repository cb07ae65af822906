"""`stage-trainer report`: a run's evaluations in one file and one table."""

from __future__ import annotations

import argparse

from stage_trainer.commands.common import add_recipe, add_settings


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "report",
        help="gather a run's evaluations into report.json and print one table",
        description="Reads what `stage-trainer evaluate` wrote into the stages' folders of the recipe's run (its "
        "output), and names the command for each stage that has not been evaluated.",
    )
    add_recipe(p)
    add_settings(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.recipe.read import load

    recipe = load(arguments.recipe, arguments.settings).recipe
    from stage_trainer.evaluation.report import write_report
    from stage_trainer.run.environment import versions

    path, text = write_report(recipe, versions())
    print(f"{text}\n\nevery figure, by language: {path}")
