"""What is predicted for stage 1 of the paper's recipe on 8 × H100: the README's table. Nothing is measured.

    python packages/stage-trainer/benchmarks/plan_paper.py           # prints the table; two minutes on a CPU
    python packages/stage-trainer/benchmarks/plan_paper.py --write   # and writes it into the README

Before: in chunks and with checkpointing, nothing compiled, adapters multiplied with each token, weights cast in each
pass, every LayerNorm in float32. After: the recipe as it
is, compiled and with `gradient_cache: auto`; the same without compiling; and with the residual streams in 16 bits, the
blocks' products in FP8, or both.
`tests/integration/test_plan_paper.py` compares.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from stage_trainer.plan import trace
from stage_trainer.plan.auto import Choice, decide
from stage_trainer.plan.devices import DEVICES
from stage_trainer.plan.flops import Flops, step_flops
from stage_trainer.plan.hard_negatives import Negatives
from stage_trainer.plan.lengths import text_lengths
from stage_trainer.plan.planner import RESERVE, Cluster, model_of, segments, shape_of, sizes_of
from stage_trainer.plan.step import Prediction, predict
from stage_trainer.plan.table import describe
from stage_trainer.plan.trace import trace_images, trace_texts
from stage_trainer.recipe import Recipe
from stage_trainer.recipe.read import load
from text_tower.lora import AdaptedLinear
from torch import nn
from vision_tower import blocks

ROOT = Path(__file__).parents[3]
RECIPE, README = ROOT / "launch/recipes/jina-clip-v2.yaml", ROOT / "packages/stage-trainer/README.md"
CLUSTER = Cluster(DEVICES["h100-80gb"], 8)
BEGIN, END = "<!-- plan_paper.py writes from here -->\n", "<!-- to here -->\n"


@dataclasses.dataclass(frozen=True)
class Column:
    """One way to run the first segment of stage 1, with what is predicted for it."""

    name: str
    choice: Choice
    time: Prediction
    flops: Flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the README")
    options = parser.parse_args()
    table = as_markdown(columns())
    print(table)
    if options.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table + END + rest.partition(END)[2])


def columns() -> list[Column]:
    eager = both("compile", "false")
    with as_before():
        cached = ["gradient_cache={images: 256, tokens: 16384}", *both("checkpointing", "true")]
        found = [column("chunks and checkpointing, eager", recipe(*cached, *eager))]
    found += [column("auto, eager", recipe(*eager)), column("the recipe: auto, compiled", recipe())]
    narrow = both("residual_in_fp32", "false")
    found += [column("in FP8", recipe("fp8=true")), column("residual in 16 bits", recipe(*narrow))]
    return [*found, column("both", recipe("fp8=true", *narrow))]


def both(key: str, value: str) -> list[str]:
    """A setting of both towers."""
    return [f"model.{tower}.{key}={value}" for tower in ("text", "vision")]


@contextmanager
def as_before() -> Iterator[None]:
    """As towers compute that form no sum of weights and adapters, cast weights in each pass and compute every LayerNorm
    in float32."""
    with ExitStack() as stack:
        for traced in (trace_texts, trace_images):
            traced.cache_clear()
            stack.callback(traced.cache_clear)
        stack.enter_context(patch.object(AdaptedLinear, "forms_sum", lambda *_: False))
        stack.enter_context(patch.object(trace, "cast_once", lambda _: nullcontext([])))
        stack.enter_context(patch.object(blocks.LayerNorm, "in_16_bits", nn.LayerNorm.forward))
        yield


def recipe(*settings: str) -> Recipe:
    return load(RECIPE, list(settings), 1, ranks=CLUSTER.ranks).recipe


def column(name: str, given: Recipe) -> Column:
    stage = given.stage(1)
    segment, lengths = segments(stage)[0], text_lengths(given, stage, None)
    memory = int(CLUSTER.device.memory - RESERVE)
    steps = range(segment.start, segment.stop)
    choice = decide(given, 1, steps, CLUSTER, memory, (lengths, lengths))
    model, sizes = model_of(given, 1, segment, "bf16"), sizes_of(stage, segment, CLUSTER.ranks, lengths, Negatives())
    time = predict(model, sizes, choice.setting, CLUSTER.device, CLUSTER.link)
    assert time is not None
    text = dataclasses.replace(model.text, checkpointing=choice.setting.checkpointing_text)
    vision = dataclasses.replace(model.vision, checkpointing=choice.setting.checkpointing_image)
    shape = shape_of(stage, segment, sizes, vision)
    flops = step_flops(text, vision, shape, trainable=stage.trainable, dims=stage.loss.dims, cached=bool(choice.cache))
    return Column(name, choice, time, flops)


def as_markdown(found: list[Column]) -> str:
    peak = CLUSTER.ranks * (CLUSTER.device.peak("bf16") or 0.0)
    rows = [
        ("predicted for a step", [f"**{each.time.total:.2f} s**" for each in found]),
        *(
            (part, [f"{dict(each.time.parts)[part]:.2f} s" for each in found])
            for part, _ in found[0].time.parts
            if any(dict(each.time.parts)[part] >= 0.005 for each in found)
        ),
        ("MFU", [f"{each.flops.model / each.time.total / peak:.0%}" for each in found]),
        ("with what is computed again", [f"{each.flops.total / each.time.total / peak:.0%}" for each in found]),
        ("memory", [f"{each.choice.planned / 2**30:.1f} GiB" for each in found]),
        ("the 88,500 steps at 224 px", [f"{88_500 * each.time.total / 86_400:.1f} days" for each in found]),
    ]
    lines = [
        ["", *(each.name for each in found)],
        ["---"] * (1 + len(found)),
        ["way to run", *(describe(each.choice.setting) for each in found)],
        *([name, *values] for name, values in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
