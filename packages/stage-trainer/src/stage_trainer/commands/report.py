"""`stage-trainer report`: a run's evaluations in one file and one table, or runs as a page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from stage_trainer.commands.common import (
    DATA,
    RECIPE,
    a_path,
    add_max_pixels,
    check_output,
    max_pixels_of,
    say,
)
from stage_trainer.errors import UserError

_SEARCHED = 1000


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "report",
        help="runs as one HTML page; or a recipe's evaluations as report.json and one table",
        usage="%(prog)s RUN [RUN …] [--out PAGE.html] [--data DATA] [--searched N] [--max-pixels N]\n"
        "       %(prog)s [--recipe RECIPE] [key=value …]",
        description="With RUN, a run's folder (a recipe's output) or several: one page that needs nothing else, with "
        "curves, figures, languages, searches, speed, data, settings and versions side by side, and its charts as PNG "
        "files in a folder beside it. What a run lacks is named there. Without: reads what `stage-trainer evaluate` "
        "wrote into the stages' folders of the recipe's run, writes report.json, prints one table, and names the "
        "command for each stage that has not been evaluated.",
    )
    p.add_argument("settings", nargs="*", metavar="RUN", help="folders of runs; or, of --recipe, key=value overrides")
    p.add_argument("--recipe", type=a_path, help=f"without RUN: a YAML file (default: {RECIPE})")
    p.add_argument(
        "--out", type=a_path, help="the page (default: RUN/report.html; of several runs report.html in this folder)"
    )
    p.add_argument(
        "--data", type=a_path, help=f"what the searches are in: {DATA} (default: what the run was evaluated on)"
    )
    p.add_argument(
        "--searched",
        type=int,
        metavar="N",
        help=f"most images searched of a data set, 0: none (default: {_SEARCHED})",
    )
    add_max_pixels(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    # A folder's name may have "=" in it, as those of a sweep have.
    named = [word for word in arguments.settings if "=" not in word or Path(word).is_dir()]
    if named:
        _page(arguments, [Path(word) for word in named])
    else:
        _table(arguments)


def _page(arguments: argparse.Namespace, runs: list[Path]) -> None:
    if arguments.recipe or len(runs) < len(arguments.settings):
        raise UserError(
            f"{', '.join(map(str, runs))}: a page is of runs alone; leave out --recipe and key=value, or the runs"
        )
    searched = _SEARCHED if arguments.searched is None else arguments.searched
    if searched < 0:
        raise UserError(f"--searched is {searched}; expected a whole number from 0")
    max_pixels = max_pixels_of(arguments)
    if not all(word.strip() for word in arguments.settings):
        raise UserError("a run is named by nothing, as by a variable that is not set; name a folder")
    if missing := [path for path in runs if not path.is_dir()]:
        raise UserError(f"there is no folder {missing[0]}; expected a run, as a recipe's `output` names it")
    out = arguments.out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is {out}; name a file that ends in .html")
    check_output(out)
    if arguments.data:
        from stage_trainer.evaluation.held_out import find

        find(arguments.data)
    say("loading PyTorch …")
    from stage_trainer.pages.report import write_page

    folder, pictures, lacks = write_page(runs, out, say, data=arguments.data, searched=searched, max_pixels=max_pixels)
    for line in lacks:
        say(f"lacking: {line}")
    print(f"wrote {out}, and its {pictures} pictures into {folder}")


def _table(arguments: argparse.Namespace) -> None:
    from stage_trainer.recipe.read import load

    if extra := [name for name in ("out", "data", "searched", "max_pixels") if getattr(arguments, name) is not None]:
        raise UserError(f"--{extra[0].replace('_', '-')} is of the page; name the run's folder, too")
    recipe = load(arguments.recipe or Path(RECIPE), arguments.settings).recipe
    from stage_trainer.evaluation.report import write_report
    from stage_trainer.run.environment import versions

    path, text = write_report(recipe, versions())
    print(f"{text}\n\nevery figure, by language: {path}")
    print(f"as a page, with curves: {shlex.join(['stage-trainer', 'report', recipe.output])}")
