"""Every name in every recipe is one that can be had: weights, tokenizers, data sets. Nothing here needs a network."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
from pathlib import Path

import open_clip
import pytest
import timm
from data_prep.cli import _parser
from stage_trainer.data.remote_data import place
from stage_trainer.recipe.read import load
from stage_trainer.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
README = (ROOT / "data_prep/README.md").read_text(encoding="utf-8")
# Repositories of the Hugging Face hub that were seen to exist, with their licences.
HUB = {
    "jinaai/jina-clip-v2": "CC-BY-NC-4.0",
    "jinaai/jina-embeddings-v3": "CC-BY-NC-4.0",
    "jinaai/jina-embeddings-v2-base-en": "Apache-2.0",
    "FacebookAI/xlm-roberta-large": "MIT",
}


def in_the_listing() -> set[str]:
    """What `data-prep corpus` makes below a split, as the README lists it."""
    found = set()
    for kind, names in re.findall(r"/(text-pairs|text-triplets|image-short|image-long)/(\{[^}]+\}|[\w-]+)/", README):
        found |= {f"{kind}/{name}" for name in names.strip("{}").split(",")}
    return found


def by_command(lines: list[str]) -> set[tuple[str, str, str]]:
    """(corpus, split, KIND/NAME) that `data-prep import images` lines make, parsed by the command's own parser."""
    found = set()
    for line in lines:
        options = parsed(line)
        assert options.held_out  # or there would be no validation
        found |= {(options.out, split, f"image-short/{options.name}") for split in ("train", "validation")}
    return found


def parsed(command: str) -> argparse.Namespace:
    """A `data-prep` command's options, as its own parser reads them; it is not run."""
    return _parser().parse_args(shlex.split(command, comments=True)[1:])


def named(recipe: Recipe) -> set[tuple[str, str]]:
    """(split, path) of every data set of a recipe."""
    sources = {
        ("train", source if isinstance(source, str) else source.path)
        for stage in recipe.stages
        for source in itertools.chain(stage.data.image_text, stage.data.text, stage.data.masked_lm)
    }
    return sources | {("validation", path) for path in recipe.evaluation.pools}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_weights_that_a_recipe_names_exist(file):
    text = file.read_text(encoding="utf-8")
    model = load(file).recipe.model
    for weights in filter(None, (model.text_weights, model.vision_weights)):
        if weights.startswith("timm/"):
            assert timm.is_model_pretrained(weights.removeprefix("timm/"))
        elif weights.startswith("runs/"):  # the quickstart's model, which another recipe leaves there
            assert any(weights.startswith(f"{load(other).recipe.output}/model/") for other in RECIPES)
        elif "/" in weights:
            assert weights in HUB
    for name in re.findall(r"\b(?:jinaai|FacebookAI|QuanSun)/[\w.-]+\w", text):  # in comments, too
        assert name in HUB, name
        assert HUB[name] in text or file.stem == "masked-lm", f"{file.name} does not say the licence of {name}"
    for name in re.findall(r"\btimm/([\w.-]+\w)", text):
        assert timm.is_model_pretrained(name), name


def test_a_model_that_the_readme_scores_with_exists():
    names = re.findall(r"open_clip:([\w.-]+):(\w+)", README)
    assert len(names) > 1
    assert set(names) - {("ARCHITECTURE", "WEIGHTS")} <= set(open_clip.list_pretrained())


def test_every_recipe_is_looked_at():
    seen = {"drawn", "finetune", "finetune-small", "jina-clip-v1", "jina-clip-v2", "laptop", "masked-lm"}
    seen |= {"documents", "joined", "lit", "margins", "smaller", "teacher"}  # `test_small_budgets`
    seen |= {"jina-clip-v2-unified", "jina-clip-v2-resolution"}  # test_paper_ablations.py
    assert {file.stem for file in RECIPES} == seen


@pytest.mark.parametrize("name", ["laptop", "masked-lm"])
def test_the_laptop_corpus_has_what_its_recipes_name(name):
    recipe = load(ROOT / f"launch/recipes/{name}.yaml").recipe
    assert {path for _, path in named(recipe)} <= in_the_listing()
    assert recipe.model.tokenizer == f"{recipe.corpus}/tokenizer.model"


def test_the_drawn_corpus_has_what_its_recipe_names(drawn_corpus):
    recipe = load(ROOT / "launch/recipes/drawn.yaml", [f"corpus={drawn_corpus}"]).recipe
    for split, path in named(recipe):
        assert (place(recipe, split, path) / "manifest.json").is_file()  # type: ignore[operator]
    assert (drawn_corpus / Path(recipe.model.tokenizer).name).is_file()


@pytest.mark.parametrize("name", ["finetune", "finetune-small"])
def test_the_commands_of_finetuning_make_what_its_recipes_name(name):
    file = ROOT / f"launch/recipes/{name}.yaml"
    recipe = load(file).recipe
    where = file if name == "finetune" else ROOT / "README.md"
    lines = re.findall(r"^(?:#   )?(data-prep import .*)$", where.read_text(encoding="utf-8"), re.M)
    assert lines
    assert {(recipe.corpus, split, path) for split, path in named(recipe)} <= by_command(lines)


def paper_commands(recipe: str) -> list[argparse.Namespace]:
    """Those of v2 stand in the README, those of v1 in the recipe's head."""
    text = (ROOT / f"launch/recipes/{recipe}.yaml").read_text(encoding="utf-8")
    if recipe == "jina-clip-v2":
        section = re.search(r"^## The paper's data$.*?(?=^## )", README, re.S | re.M)
        assert section
        text = section[0]
    return [parsed(line) for line in re.findall(r"^(?:#   )?(data-prep .*)$", text, re.M)]


@pytest.mark.parametrize("name", ["jina-clip-v1", "jina-clip-v2"])
def test_there_is_a_command_for_each_name_of_the_papers_recipe(name):
    """What v2's commands make is in test_paper_data.py, which runs them; here: that each is understood and fits."""
    recipe = load(ROOT / f"launch/recipes/{name}.yaml").recipe
    made = set()
    for options in paper_commands(name):
        out = Path(options.out) if hasattr(options, "out") else Path(options.ledger)
        split = getattr(options, "split", None)
        name = getattr(options, "name", None)
        made.add((str(out / split if split else out), name))
    for split, path in named(recipe):
        name = path.partition("/")[2]
        folder = f"{recipe.corpus}/{split}"
        assert (folder, name) in made or (f"{folder}/image-long/{name}", None) in made, path
