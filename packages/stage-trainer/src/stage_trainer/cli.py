"""The `stage-trainer` command. Heavy imports happen inside the subcommands, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from stage_trainer.commands import demo, encode, evaluate, export, mteb, plan, push, report, search, train
from stage_trainer.errors import Stopped, is_user_error
from stage_trainer.run.forwarding import unpack

EPILOG = """examples:
  stage-trainer train --recipe launch/recipes/laptop.yaml --stage 1
  stage-trainer train --recipe launch/recipes/laptop.yaml --stage 1 checkpoint.every=50 precision=fp32
  stage-trainer train --recipe launch/recipes/masked-lm.yaml --stage 1
  stage-trainer train --recipe launch/recipes/jina-clip-v2.yaml --stage 3 --dry-run
  stage-trainer plan --recipe launch/recipes/jina-clip-v2.yaml --gpus 8 --gpu h100-80gb --price 2.5
  deepspeed -q --num_gpus 8 launch/stage1.sh --recipe launch/recipes/jina-clip-v2.yaml
  stage-trainer export runs/laptop/stage3 my-model
  stage-trainer evaluate my-model runs/corpus
  stage-trainer mteb my-model STSBenchmark Flickr30kT2IRetrieval
  stage-trainer report runs/laptop
  stage-trainer search my-model runs/corpus "ein Hund" --out found.png
  stage-trainer demo my-model photos
  stage-trainer encode my-model photos captions.txt --out vectors.parquet
  stage-trainer push my-model OWNER/NAME

`stage-trainer COMMAND --help` says what each takes. `tensorboard --logdir runs/laptop` shows a run; its page Custom
Scalars has what matters.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand. What the user can correct is one message and exit code 2; a requested stop is exit code 75."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    # argparse takes a command's free words only in one row; people also write them between options.
    free = next((name for name in ("settings", "queries", "files", "tasks") if name in arguments), "")
    if rest and (not free or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(arguments, free).extend(rest)
    from data_prep.shards import escaped_output

    with escaped_output():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
    except Stopped as error:
        print(f"stage-trainer: {error}", file=sys.stderr, flush=True)
        return Stopped.EXIT_CODE
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        print(f"stage-trainer: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stage-trainer: stopped; the same command resumes from the last checkpoint", file=sys.stderr)
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
    for module in (train, plan, export, evaluate, mteb, report, search, demo, encode, push):
        module.add(commands)
    return top


def launch(stage: int) -> None:
    """What launch/stageN.sh runs: `train --stage N` with RECIPE from the environment, unless --recipe is given."""
    words = unpack(sys.argv[1:])
    arguments = ["train", "--stage", str(stage)]
    if recipe := os.environ.get("RECIPE"):
        arguments += ["--recipe", recipe]
    sys.exit(main([*arguments, *words]))


if __name__ == "__main__":
    sys.exit(main())
