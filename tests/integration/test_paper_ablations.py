"""The recipes of the paper's two ablations: what they change of jina-clip-v2.yaml, and that they fit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stage_trainer.commands.dry_run import dry_run
from stage_trainer.recipe.read import load

RECIPES = Path(__file__).parents[2] / "launch/recipes"
PAPER = load(RECIPES / "jina-clip-v2.yaml").recipe
SIZES = (224, 384, 512, 768)


def test_the_unified_batch_is_the_papers_first_stage_with_another_loss():
    recipe = load(RECIPES / "jina-clip-v2-unified.yaml").recipe
    (stage,) = recipe.stages
    assert (stage.loss.kind, stage.loss.image_views, stage.loss.views) == ("unified", True, 2)
    first = PAPER.stages[0]
    assert replace(stage, loss=replace(stage.loss, kind="multi_task")) == first
    names = {"name": PAPER.name, "paper": PAPER.paper, "output": PAPER.output, "stages": PAPER.stages}
    assert replace(recipe, **names) == PAPER


@pytest.mark.parametrize("size", SIZES)
def test_a_branch_of_resolution_differs_from_the_second_stage_in_data_steps_and_pixels(size):
    overrides = [f"resolution=[[0, {size}]]", f"output=runs/{size}"]
    recipe = load(RECIPES / "jina-clip-v2-resolution.yaml", overrides, stage=1).recipe
    (stage,), second = recipe.stages, PAPER.stages[1]
    assert (stage.steps, stage.resolution) == (3500, ((0, size),))
    same = replace(stage, steps=second.steps, resolution=second.resolution, data=second.data)
    assert same == second
    assert stage.data.text == second.data.text
    rates = {source.path: source.rate for source in second.data.image_text}
    assert all(source.rate == rates[source.path] for source in stage.data.image_text)
    assert recipe.model.weights == "runs/jina-clip-v2-224"
    assert (recipe.model.text, recipe.model.vision) == (PAPER.model.text, PAPER.model.vision)
    assert (recipe.optimizer, recipe.precision) == (PAPER.optimizer, PAPER.precision)


@pytest.mark.parametrize("name", ["unified", "resolution"])
def test_the_dry_run_of_an_ablation_shows_its_source(name):
    shown = dry_run(load(RECIPES / f"jina-clip-v2-{name}.yaml"), 1)
    assert "arXiv 2412.08802" in shown
    assert ("unified" in shown) is (name == "unified")


@pytest.mark.full
@pytest.mark.parametrize("name", ["unified", "resolution"])
def test_a_plan_finds_a_way_in_which_an_ablation_fits_eight_gpus(name):
    command = [
        Path(sys.executable).with_name("stage-trainer"),
        "plan",
        "--recipe",
        RECIPES / f"jina-clip-v2-{name}.yaml",
    ]
    run = subprocess.run(
        [*map(str, command), "--gpus", "8", "--gpu", "h100-80gb"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "fastest that fits" in run.stdout
    assert "in the fastest way that fits:" in run.stdout
