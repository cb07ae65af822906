"""The `stage-trainer` command. Heavy imports happen inside the subcommands, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_RECIPE = "launch/recipes/laptop.yaml"

EPILOG = """examples:
  stage-trainer train --recipe launch/recipes/laptop.yaml --stage 1
  stage-trainer train --recipe launch/recipes/laptop.yaml --stage 1 steps=20 precision=fp32
  stage-trainer train --recipe launch/recipes/masked-lm.yaml --stage 1
  stage-trainer train --recipe launch/recipes/jina-clip-v2.yaml --stage 3 --dry-run
  stage-trainer plan --recipe launch/recipes/jina-clip-v2.yaml --gpus 8 --gpu h100-80gb --price 2.5
  deepspeed -q --num_gpus 8 launch/stage1.sh --recipe launch/recipes/jina-clip-v2.yaml
  stage-trainer export runs/laptop/stage3 my-model
  stage-trainer evaluate my-model runs/corpus
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
        "settings", nargs="*", metavar="key=value", help="overrides, such as steps=20 or optimizer.name=adamw"
    )
    p.set_defaults(run=_train)

    p = commands.add_parser(
        "plan",
        help="what fits, how long it takes and what it costs, before it runs",
        description="Plans a recipe's stages for given devices: which settings fit, memory by part, operations, "
        "samples a second, days and money. It needs neither a GPU nor the data.",
    )
    p.add_argument("--recipe", default=DEFAULT_RECIPE, help="a YAML file (default: %(default)s)")
    p.add_argument("--stage", type=int, help="this stage alone (default: all)")
    p.add_argument("--gpus", type=int, default=1, help="how many devices, in data parallel (default: %(default)s)")
    p.add_argument("--gpu", default="h100-80gb", help="which, such as a100-40gb, or cpu (default: %(default)s)")
    p.add_argument("--memory", help="of one device, over what the table says, such as 24GiB")
    p.add_argument("--peak", type=float, help="dense operations a second of one device, such as 165e12, likewise")
    p.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the peak that is reached (default: %(default)s)"
    )
    p.add_argument("--price", type=float, help="of one device for one hour")
    p.add_argument(
        "--mean-tokens", type=float, help="of a text (default: as the sidecars count, or half of max_tokens)"
    )
    p.add_argument("settings", nargs="*", metavar="key=value", help="overrides, as for train")
    p.set_defaults(run=_plan)

    p = commands.add_parser("export", help="take the model out of a checkpoint or a finished stage")
    p.add_argument("checkpoint", type=Path, help="a checkpoint, or a stage's folder (its newest checkpoint)")
    p.add_argument("out", type=Path, help="the directory to write; it must not exist")
    p.set_defaults(run=_export)

    p = commands.add_parser("evaluate", help="recall@5 of an exported model on held-out pools")
    p.add_argument("model", type=Path, help="an exported model, a checkpoint, or a stage's folder")
    p.add_argument("data", type=Path, help="a corpus (its test split is used), or a folder of data sets")
    p.add_argument("--json", type=Path, help="also write every figure, by language, to this file")
    p.add_argument("--by-language", action="store_true", help="also print text→image for each language")
    p.set_defaults(run=_evaluate)

    p = commands.add_parser("report", help="gather a run's evaluations into report.json and print one table")
    p.add_argument("--recipe", default=DEFAULT_RECIPE, help="a YAML file (default: %(default)s)")
    p.add_argument("settings", nargs="*", metavar="key=value", help="overrides, as for train")
    p.set_defaults(run=_report)

    p = commands.add_parser("search", help="draw a picture: what a model finds for some queries")
    p.add_argument("model", type=Path, help="an exported model, a checkpoint, or a stage's folder")
    p.add_argument("data", type=Path, help="a corpus (its test split is used), or a folder of data sets")
    p.add_argument("--out", type=Path, default=Path("search.png"), help="the picture (default: %(default)s)")
    p.add_argument("queries", nargs="*", help="texts; without any, a few of the pools' own in several languages")
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
    from stage_trainer.recipe.read import load

    loaded = load(arguments.recipe, arguments.settings, arguments.stage)
    loaded.recipe.stage(arguments.stage)
    if arguments.dry_run:
        from stage_trainer.dry_run import dry_run

        print(dry_run(loaded, arguments.stage))
        return
    import os

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
    from stage_trainer.plan.devices import device
    from stage_trainer.plan.planner import Cluster, plan_stage
    from stage_trainer.plan.table import heading, stage_table
    from stage_trainer.recipe.read import load

    if arguments.gpus < 1 or not 0 < arguments.utilisation <= 1:
        raise UserError(
            f"--gpus is {arguments.gpus} and --utilisation {arguments.utilisation:g}; expected at least 1, and a share "
            "above 0 and up to 1"
        )
    recipe = load(arguments.recipe, arguments.settings, arguments.stage).recipe
    found = device(arguments.gpu, memory=arguments.memory, peak=arguments.peak)
    cluster = Cluster(found, arguments.gpus, arguments.utilisation, arguments.price)
    print(heading(recipe, cluster))
    numbers = [arguments.stage] if arguments.stage else [n for n, s in enumerate(recipe.stages, 1) if not s.masked]
    for number in numbers:
        print("\n" + stage_table(plan_stage(recipe, number, cluster, mean_tokens=arguments.mean_tokens), cluster))


def _model_directory(path: Path) -> Path:
    """An exported model itself, a checkpoint's model, or that of a stage's newest checkpoint."""
    from stage_trainer.errors import UserError
    from stage_trainer.run.checkpoint import all_saved

    if (path / "config.json").exists():
        return path
    if (path / "model" / "config.json").exists():
        return path / "model"
    if saved := all_saved(path):
        return saved[-1].model
    raise UserError(
        f"{path} holds no model; expected an exported model, a checkpoint, or a stage's folder with checkpoints"
    )


def _export(arguments: argparse.Namespace) -> None:
    from stage_trainer.model import DualEncoder

    DualEncoder.from_pretrained(_model_directory(arguments.checkpoint)).save_pretrained(arguments.out)
    print(f"wrote {arguments.out}; load it with stage_trainer.DualEncoder.from_pretrained({str(arguments.out)!r})")


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from stage_trainer.evaluation.retrieval import DIRECTIONS
    from stage_trainer.files import write_whole
    from stage_trainer.run.report import evaluate, languages_table, table

    pools = evaluate(_model_directory(arguments.model), arguments.data)
    print(table(pools))
    if arguments.by_language:
        print("\n" + languages_table(pools, DIRECTIONS[0]))
    if arguments.json:
        write_whole(arguments.json, json.dumps(pools, indent=1, ensure_ascii=False) + "\n")


def _report(arguments: argparse.Namespace) -> None:
    from stage_trainer.recipe.read import load
    from stage_trainer.run.report import write_report

    recipe = load(arguments.recipe, arguments.settings).recipe
    path, text = write_report(recipe.output, recipe.name, recipe.seed)
    print(f"{text}\n\nevery figure, by language: {path}")


def _search(arguments: argparse.Namespace) -> None:
    from stage_trainer.evaluation.picture import draw_search

    draw_search(_model_directory(arguments.model), arguments.data, arguments.queries, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
