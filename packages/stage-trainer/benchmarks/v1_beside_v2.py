"""jina-clip-v1's shape beside jina-clip-v2's on the laptop corpus at equal compute: English alone, and all languages.

    python packages/stage-trainer/benchmarks/v1_beside_v2.py --corpus runs/corpus     # half an hour on two cores

Both are the laptop recipe's size and train as its first stage says; of v1 are the text tower's blocks (JinaBERT: ALiBi,
GEGLU) and the image tower's rotary positions (as they are, without a reference grid). A gated MLP of the same width has
half as many weights again, so v1 makes fewer steps: as many as take the same floating-point operations (`plan.flops`,
on the lengths of the texts that were drawn). What is measured is held out: recall@5 on the test split's emoji.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
from data_prep.shards import Dataset, DatasetWriter
from stage_trainer.build import load_tokenizer
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.plan.flops import StepShape, step_flops
from stage_trainer.recipe import Recipe
from stage_trainer.recipe.read import load
from stage_trainer.tasks import make_task

V1 = {"positions": "alibi", "mlp": "geglu", "token_types": 2}
SHAPES = ("v1", "v2")
# Of pairs in two languages nothing is left in English.
ENGLISH = {
    "laptop.yaml": ("data.text=[{path: text-pairs/emoji-keywords, rate: 2}, {path: text-pairs/packages, rate: 1}]",),
    "drawn.yaml": ("batch.text=0", "data.text=[]"),
}
DIRECTIONS = ("text→image", "image→text")


def main() -> None:
    parser = common.parser(__doc__, "v1_beside_v2")
    parser.add_argument("--steps", type=int, default=700, help="of v2's shape; v1's makes as many as cost the same")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.small:
        options.steps = min(options.steps, 3)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        english = Path(scratch) / "english"
        in_english(Path(options.corpus), english)
        for languages, corpus in (("English", english), ("all", Path(options.corpus))):
            for shape in SHAPES:
                found = [train(options, shape, corpus, seed, Path(scratch)) for seed in range(options.seeds)]
                results[f"{shape}, {languages}"] = found
                print(f"{shape}, {languages}:", json.dumps(found), flush=True)
    common.write(options.results, {name: getattr(options, name) for name in ("steps", "seeds", "threads")}, results)


def in_english(corpus: Path, to: Path) -> None:
    """Writes a corpus of the English texts of another; a pair needs two that differ."""
    to.mkdir()
    shutil.copy(corpus / "tokenizer.model", to)
    for manifest in sorted(corpus.glob("*/*/*/manifest.json")):
        data = Dataset.open(manifest.parent)
        kept = list(of_english(data))
        if not kept:  # all of its pairs are of two languages
            continue
        with DatasetWriter(to / manifest.parent.relative_to(corpus), kind=data.kind, source=data.source) as writer:
            for key, members in kept:
                writer.write(key, members, languages=["en"], tokens=None)


def of_english(data: Dataset) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(len(data)):
        members = data.read(number)
        content = json.loads(members["json"])
        for part in {"captions", "query", "target"} & content.keys():
            content[part] = [text for text in content[part] if text["language"] == "en"]
        if "negatives" in content:
            content["negatives"] = [[t for t in each if t["language"] == "en"] for each in content["negatives"]]
        parts = [content[part] for part in ("captions", "query", "target") if part in content]
        parts += content.get("negatives", [])
        words = [{text["text"] for text in part} for part in parts]
        if all(words) and ("query" not in content or len(words[0] | words[1]) > 1):
            yield data.row(number).key, {**members, "json": json.dumps(content, ensure_ascii=False).encode()}


def train(options: argparse.Namespace, shape: str, corpus: Path, seed: int, scratch: Path) -> dict[str, Any]:
    """Trains one shape and measures it: steps, operations, recall@5 in percent at the full width."""
    recipe = common.RECIPES / ("drawn.yaml" if options.small else "laptop.yaml")
    its = ENGLISH[recipe.name] if corpus.name == "english" else ()
    text = load(recipe, stage=1).recipe.model.text
    of_shape = {"v2": [], "v1": ["model.vision.reference_grid=null", f"model.text={json.dumps(v1_of(text))}"]}
    cost = {}
    for name, overrides in of_shape.items():
        asked = [*settings(corpus, options.steps), *its, *overrides]
        cost[name] = operations(load(recipe, asked, 1).recipe)
    steps = max(1, round(options.steps * cost["v2"] / cost[shape]))
    out, trainer = scratch / f"{shape}-{corpus.name}-{seed}", Path(sys.executable).with_name("stage-trainer")
    asked = [*settings(corpus, steps), *its, *of_shape[shape], f"output={out}", f"seed={seed}", "evaluation.every=0"]
    figures = out / "figures.json"
    for command in (
        [trainer, "train", "--recipe", recipe, "--stage", "1", *asked],
        [trainer, "evaluate", out / "stage1", corpus, "--json", figures],
    ):
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=environment)
    return {"steps": steps, "operations": steps * cost[shape], **recalls(json.loads(figures.read_text()))}


def v1_of(text: Mapping[str, object]) -> dict[str, object]:
    """A text tower of the same size: without rotary positions, there is no theta."""
    return {name: value for name, value in text.items() if name != "rope_theta"} | V1


def settings(corpus: Path, steps: int) -> list[str]:
    """The recipe's first stage in so many steps, its parts of the same shares."""
    of_corpus = [f"corpus={corpus}", f"model.tokenizer={corpus}/tokenizer.model"]
    parts = [f"task_start={{image_text: {150 * steps // 700}}}", f"warmup_steps={50 * steps // 700}"]
    return [*of_corpus, f"steps={steps}", *parts, "resolution=[[0, 36]]", "precision=fp32"]


def operations(recipe: Recipe) -> int:
    """Of a step with both tasks, on the texts of a few batches: of the towers and losses."""
    task, stage = make_task(recipe, 1), recipe.stage(1)
    model = task.empty_model()
    assert isinstance(model, DualEncoder)
    batches, first = task.make_batches(load_tokenizer(recipe), 0, 1), stage.task_start.image_text
    found = []
    for number in range(first, min(first + 8, stage.steps)):
        batch, _ = batches[number]
        shape = StepShape.of(batch, model.vision.config, stage.patch_dropout_at(number))
        found.append(step_flops(model.text.config, model.vision.config, shape, dims=stage.loss.dims).model)
    return sum(found) // len(found)


def recalls(pools: dict[str, Any]) -> dict[str, float]:
    """Recall@5 in percent at the full width, of English and as the mean over the languages that there are."""
    name = next(name for name in ("emoji", "drawn") if name in pools)
    widest = {direction: next(iter(of.values())) for direction, of in pools[name]["recall_at_5"].items()}
    return {
        f"{direction}, {language}": round(100 * widest[direction][language], 2)
        for direction in DIRECTIONS
        for language in ("en", "mean")
    }


if __name__ == "__main__":
    main()
