"""What several subcommands share: arguments, messages, and finding the model that a path means."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stage_trainer.errors import UserError

MODEL = "an exported model, a checkpoint, a stage's folder with checkpoints, or a model's name on the Hugging Face hub"
RECIPE = "launch/recipes/laptop.yaml"
DATA = "a corpus (its test split is used, or else its validation split), a folder of data sets, or one data set"


def a_path(text: str) -> Path:
    """The type of an argument: an empty one, as of a variable that is not set, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder")
    return Path(text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=a_path, default=RECIPE, help="a YAML file (default: %(default)s)")


def add_settings(parser: argparse.ArgumentParser, help: str = "overrides, as for train") -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help=help)


def say(line: str) -> None:
    """Shows progress, on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def check_output(path: Path) -> None:
    """UserError unless this file can be written, before the work rather than after it. Its folder has to exist."""
    from stage_trainer.files import check_can_write, writing

    with writing(path):
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise UserError(f"{path} is {kind}; name a file to write")
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} for {path.name}; make it, or name another place")
    check_can_write(path)


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="refuse data with larger images (default: as in a recipe)"
    )


def max_pixels_of(arguments: argparse.Namespace) -> int:
    """--max-pixels, or a recipe's default.

    Raises:
        UserError: it is out of the range that a recipe's has.
    """
    from stage_trainer.recipe.limits import MAX_PIXELS
    from stage_trainer.recipe.ranges import OF_RECIPE

    found = arguments.max_pixels
    if found is not None and found not in OF_RECIPE["max_pixels"]:
        raise UserError(f"--max-pixels is {found}; expected {OF_RECIPE['max_pixels']}")
    return MAX_PIXELS if found is None else int(found)


def find_model(path: Path) -> tuple[Path, Path | None]:
    """(the model's directory, the checkpoint that it is in): an exported model, that of a checkpoint, that of a stage's
    newest checkpoint, or one of the hub, which is downloaded once.

    Raises:
        UserError: there is no model at `path`, or its checkpoint is damaged.
    """
    from stage_trainer import hub

    if hub.is_name(str(path)):
        say(f"there is no {path} here: taking that of the Hugging Face hub …")
        return hub.local(str(path)), None
    if not path.exists():
        raise UserError(f"there is no {path}; expected {MODEL}")
    say("loading PyTorch …")
    from stage_trainer.checkpoint.load import all_saved, at, path_of, read_best

    if (path / "config.json").exists():
        return path, None
    if (path / "state.json").exists():
        saved = at(path)
    elif in_stage := all_saved(path):
        saved = in_stage[-1]
        try:
            best = read_best(path)
        except UserError as error:  # no reason to refuse the newest
            best = {}
            say(str(error))
        other = path_of(path, best["step"]) if best else saved.path
        hint = f"; the best by {best['metric']} is {other}" if best and other != saved.path else ""
        say(f"taking {saved.path}, the newest{hint}")
    else:
        trained = [directory for directory in sorted(path.glob("stage*")) if all_saved(directory)]
        hint = f"; its stages are {', '.join(map(str, trained))}: name one" if trained else ""
        raise UserError(f"{path} holds no model; expected {MODEL}{hint}")
    if damage := saved.damage("model/"):
        raise UserError(f"{saved.path} is damaged: {damage}; name another checkpoint of {saved.path.parent}")
    return saved.model, saved.path
