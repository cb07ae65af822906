"""The `stage-trainer` command. Heavy imports happen inside the subcommands, so that --help answers at once."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_RECIPE = "launch/recipes/laptop.yaml"

_MODEL = "an exported model, a checkpoint, or a stage's folder with checkpoints"
_DATA = "a corpus (its test split is used, or else its validation split), a folder of data sets, or one data set"

EPILOG = """examples:
  stage-trainer train --recipe launch/recipes/laptop.yaml --stage 1
  stage-trainer train --recipe launch/recipes/laptop.yaml --stage 1 checkpoint.every=50 precision=fp32
  stage-trainer train --recipe launch/recipes/masked-lm.yaml --stage 1
  stage-trainer train --recipe launch/recipes/jina-clip-v2.yaml --stage 3 --dry-run
  stage-trainer plan --recipe launch/recipes/jina-clip-v2.yaml --gpus 8 --gpu h100-80gb --price 2.5
  deepspeed -q --num_gpus 8 launch/stage1.sh --recipe launch/recipes/jina-clip-v2.yaml
  stage-trainer export runs/laptop/stage3 my-model
  stage-trainer evaluate my-model runs/corpus
  stage-trainer search my-model runs/corpus "ein Hund" --out found.png

`stage-trainer COMMAND --help` says what each takes. `tensorboard --logdir runs/laptop` shows a run; its page Custom
Scalars has what matters.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; what a person can mend is one message and exit code 2, an end that was asked for 75."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    # argparse takes the free words of a command only in one row; people also write them between options.
    free = next((name for name in ("settings", "queries") if name in arguments), "")
    if rest and (not free or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(arguments, free).extend(rest)
    from stage_trainer.errors import Stopped, speaks_for_itself

    try:
        arguments.run(arguments)
    except Stopped as error:
        print(f"stage-trainer: {error}", file=sys.stderr, flush=True)
        return Stopped.EXIT_CODE
    except (ValueError, FileNotFoundError) as error:
        if not speaks_for_itself(error):
            raise
        print(f"stage-trainer: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stage-trainer: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="stage-trainer",
        description="Trains a text and an image encoder into one space, stage by stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    p = commands.add_parser("train", help="train a stage, or go on with it where it stopped")
    p.add_argument("--recipe", default=DEFAULT_RECIPE, help="a YAML file (default: %(default)s)")
    p.add_argument("--stage", type=int, required=True, help="the stage's number, from 1")
    p.add_argument("--dry-run", action="store_true", help="print parameters and settings; train nothing")
    p.add_argument("--start-over", action="store_true", help="move what this stage has aside and start it anew")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    p.add_argument(
        "settings", nargs="*", metavar="key=value", help="overrides, such as batch.text=64 or optimizer.name=adamw"
    )
    p.set_defaults(run=_train)

    p = commands.add_parser(
        "plan",
        help="what fits, how long training takes and what it costs, before it runs",
        description="Plans a recipe's stages for given devices: which settings fit, memory by part, operations, "
        "samples a second, days and money, and how many texts max_tokens cuts. It needs neither a GPU nor the data; "
        "of data that are here a sample is counted. It takes about a minute for each stage of a large model.",
    )
    p.add_argument("--recipe", default=DEFAULT_RECIPE, help="a YAML file (default: %(default)s)")
    p.add_argument("--stage", type=int, help="this stage alone (default: all)")
    p.add_argument("--gpus", type=int, default=1, help="how many devices, in data parallel (default: %(default)s)")
    p.add_argument("--gpu", default="h100-80gb", help="which, such as a100-40gb, or cpu (default: %(default)s)")
    p.add_argument("--memory", help="of one device, over what the table says, such as 24GiB")
    p.add_argument(
        "--peak", type=float, help="most dense operations a second of one device, over what the table says, as 165e12"
    )
    p.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of that peak which training reaches (default: %(default)s)",
    )
    p.add_argument("--price", type=float, help="of one device for one hour, in any currency")
    p.add_argument("--mean-tokens", type=float, help="of a text (default: counted on the data, or half of max_tokens)")
    p.add_argument("settings", nargs="*", metavar="key=value", help="overrides, as for train")
    p.set_defaults(run=_plan)

    p = commands.add_parser(
        "export",
        help="take the model out of a checkpoint or a finished stage",
        description="Writes a directory for stage_trainer.DualEncoder.from_pretrained. Of a stage's folder it takes "
        "the newest checkpoint, and says so; name a step-… folder for another.",
    )
    p.add_argument("checkpoint", type=Path, help="a checkpoint, or a stage's folder (its newest checkpoint)")
    p.add_argument("out", type=Path, help="the directory to write; it must not exist")
    p.set_defaults(run=_export)

    p = commands.add_parser(
        "evaluate",
        help="figures of a model on held-out data: recall@5 of images and captions, nDCG of text pairs",
        description="Measures every data set that DATA holds: of images with captions recall@5 in each direction (of "
        "pages that answer queries nDCG@5, too), of text pairs and triplets nDCG@10, at each Matryoshka dim. What is "
        "found of a stage's folder is also written into it, as evaluation.json, for `stage-trainer report`.",
    )
    p.add_argument("model", type=Path, help=_MODEL)
    p.add_argument("data", type=Path, help=_DATA)
    p.add_argument("--json", type=Path, help="also write every figure, by language, to this file")
    p.add_argument("--by-language", action="store_true", help="also print text→image (of texts nDCG) by language")
    p.set_defaults(run=_evaluate)

    p = commands.add_parser(
        "report",
        help="gather a run's evaluations into report.json and print one table",
        description="Reads what `stage-trainer evaluate` wrote into the stages' folders of the recipe's run (its "
        "output), and names the command for each stage that has not been evaluated.",
    )
    p.add_argument("--recipe", default=DEFAULT_RECIPE, help="a YAML file (default: %(default)s)")
    p.add_argument("settings", nargs="*", metavar="key=value", help="overrides, as for train")
    p.set_defaults(run=_report)

    p = commands.add_parser("search", help="draw a picture: what a model finds for some queries")
    p.add_argument("model", type=Path, help=_MODEL)
    p.add_argument("data", type=Path, help=f"where the images are: {_DATA}")
    p.add_argument("--out", type=Path, default=Path("search.png"), help="the picture (default: %(default)s)")
    p.add_argument("queries", nargs="*", help="texts; without any, twelve of the data's own captions are searched for")
    p.set_defaults(run=_search)
    return top


def launch(stage: int) -> None:
    """What launch/stageN.sh runs: `train --stage N` with RECIPE from the environment, unless --recipe is given."""
    import os

    arguments = ["train", "--stage", str(stage)]
    if recipe := os.environ.get("RECIPE"):
        arguments += ["--recipe", recipe]
    sys.exit(main([*arguments, *sys.argv[1:]]))


def _train(arguments: argparse.Namespace) -> None:
    import os

    from stage_trainer.errors import UserError
    from stage_trainer.recipe.read import load

    world = os.environ.get("WORLD_SIZE", "")  # as every launcher tells its processes
    ranks = int(world) if world.isdecimal() else 1
    try:
        loaded = load(arguments.recipe, arguments.settings, arguments.stage, ranks=ranks)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        sys.exit(2)  # the first rank of this machine says it
    if arguments.dry_run:
        from stage_trainer.dry_run import dry_run

        print(dry_run(loaded, arguments.stage))
        return
    from stage_trainer.run.alone import hold_folder
    from stage_trainer.run.stop import leave_when_asked

    rank = int(os.environ.get("RANK", 0))
    with leave_when_asked(rank), hold_folder(loaded.recipe, rank) as refusal:
        if rank == 0:
            print("loading PyTorch …", flush=True)
        from stage_trainer.run.train import train

        train(loaded.recipe, arguments.stage, start_over=arguments.start_over, refusal=refusal)


def _plan(arguments: argparse.Namespace) -> None:
    from stage_trainer.errors import UserError
    from stage_trainer.recipe.read import load

    if arguments.gpus < 1 or not 0 < arguments.utilisation <= 1:
        raise UserError(
            f"--gpus is {arguments.gpus} and --utilisation {arguments.utilisation:g}; expected at least 1, and a share "
            "above 0 and up to 1"
        )
    for name in ("peak", "price", "mean_tokens"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; expected a number above 0")
    recipe = load(arguments.recipe, arguments.settings, arguments.stage, ranks=arguments.gpus).recipe
    # Only now what imports torch: a mistake is told at once.
    _say("loading PyTorch …")
    from stage_trainer.plan.devices import device
    from stage_trainer.plan.planner import Cluster, plan_stage
    from stage_trainer.plan.table import heading, stage_table
    from stage_trainer.weights import absent

    found = device(arguments.gpu, memory=arguments.memory, peak=arguments.peak)
    cluster = Cluster(found, arguments.gpus, arguments.utilisation, arguments.price)
    print(heading(recipe, cluster), flush=True)
    for name in absent(recipe.model):
        _say(f"{name} is not on this machine: its sizes are the recipe's, or else the towers' defaults")
    for number, stage in enumerate(recipe.stages, 1):
        if arguments.stage == number or (arguments.stage is None and not stage.masked):
            planned = plan_stage(recipe, number, cluster, mean_tokens=arguments.mean_tokens, say=_say)
            print("\n" + stage_table(planned, cluster), flush=True)
        elif arguments.stage is None:
            print(f"\nstage {number} is masked-language-model training, which is not planned", flush=True)


def _model_directory(path: Path) -> tuple[Path, Path | None]:
    """(an exported model itself, a checkpoint's model, or that of a stage's newest checkpoint; that checkpoint)."""
    from stage_trainer.errors import UserError

    if not path.exists():
        raise UserError(f"there is no {path}; expected {_MODEL}")
    _say("loading PyTorch …")
    from stage_trainer.run.checkpoint import Saved, all_saved, path_of, read_best

    if (path / "config.json").exists():
        model, saved = path, None
    elif (path / "state.json").exists():
        model, saved = path / "model", Saved(path, 0)
    elif in_stage := all_saved(path):
        saved = in_stage[-1]
        model = saved.model
        best = read_best(path)
        other = path_of(path, best["step"]) if best else saved.path
        hint = f"; the best by {best['metric']} is {other}" if other != saved.path else ""
        _say(f"taking {saved.path}, the newest{hint}")
    else:
        trained = [directory for directory in sorted(path.glob("stage*")) if all_saved(directory)]
        hint = f"; its stages are {', '.join(map(str, trained))}: name one" if trained else ""
        raise UserError(f"{path} holds no model; expected {_MODEL}{hint}")
    if saved and (damage := saved.damage("model/")):
        raise UserError(f"{saved.path} is damaged: {damage}; name another checkpoint of {saved.path.parent}")
    return model, saved.path if saved else None


def _can_be_written(path: Path | None) -> None:
    """Finds before the work, not after it, that there is no folder for what comes out."""
    from stage_trainer.errors import UserError

    if path and not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for {path.name}; make it, or name another place")


def _say(line: str) -> None:
    """What is under way, for people; figures and paths are the output."""
    print(line, file=sys.stderr, flush=True)


def _export(arguments: argparse.Namespace) -> None:
    from stage_trainer.errors import UserError

    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already; name another place or move it away")
    model, _ = _model_directory(arguments.checkpoint)
    from stage_trainer.dual_encoder import DualEncoder

    DualEncoder.from_pretrained(model).save_pretrained(arguments.out)
    print(
        f"wrote {arguments.out}\n"
        f"  in Python:  stage_trainer.DualEncoder.from_pretrained({str(arguments.out)!r})\n"
        f"  figures:    stage-trainer evaluate {shlex.quote(str(arguments.out))} DATA\n"
        f'  picture:    stage-trainer search {shlex.quote(str(arguments.out))} DATA "some words"'
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from stage_trainer.evaluation.held_out import find

    _can_be_written(arguments.json)
    find(arguments.data)  # before PyTorch is loaded
    model, checkpoint = _model_directory(arguments.model)
    from stage_trainer.evaluation.retrieval import DIRECTIONS
    from stage_trainer.files import write_whole
    from stage_trainer.run.report import EVALUATION, evaluate, languages_table, table

    pools = evaluate(model, arguments.data, _say)
    if checkpoint:
        pools = {name: {**figures, "checkpoint": checkpoint.name} for name, figures in pools.items()}
    print(table(pools))
    if arguments.by_language:
        print("\n" + languages_table(pools, DIRECTIONS[0]))
    # A stage's figures stand in its folder, where `report` looks for them.
    of_stage = [arguments.model / EVALUATION] if checkpoint and checkpoint.parent == arguments.model else []
    wanted = [arguments.json] if arguments.json else []
    for path in dict.fromkeys([*of_stage, *wanted]):
        write_whole(path, json.dumps(pools, indent=1, ensure_ascii=False) + "\n")
        print(f"\nevery figure, by language: {path}")


def _report(arguments: argparse.Namespace) -> None:
    from stage_trainer.recipe.read import load
    from stage_trainer.run.report import write_report

    path, text = write_report(load(arguments.recipe, arguments.settings).recipe)
    print(f"{text}\n\nevery figure, by language: {path}")


def _search(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.held_out import find

    _can_be_written(arguments.out)
    find(arguments.data)  # before PyTorch is loaded
    model, _ = _model_directory(arguments.model)
    from stage_trainer.evaluation.picture import draw_search

    draw_search(model, arguments.data, arguments.queries, arguments.out, _say)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
