"""What `evaluate` and `search` take for held-out data, and what they say where there is none."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from data_prep.shards import DatasetWriter
from stage_trainer.data.config import DataConfig
from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import find
from stage_trainer.evaluation.measures import check_best_of
from stage_trainer.evaluation.retrieval import Pool
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.ranges import OF_RECIPE
from stage_trainer.recipe.read import load
from stage_trainer.tasks.pools import PoolValidation
from vision_tower.preprocess import MAX_PIXELS


@pytest.fixture
def write(tmp_path, png):
    def execute(place, kind="image-short", source=None, captions=(("a", "name"),)):
        directory = tmp_path / place
        with DatasetWriter(directory, kind=kind, source=source or directory.name) as writer:
            made = [{"text": text, "language": "en", "role": role} for text, role in captions]
            if kind.startswith("image"):
                members = {"png": png, "json": json.dumps({"captions": made}).encode()}
            else:
                members = {"json": json.dumps({"query": made, "target": made}).encode()}
            writer.write("s", members, languages=["en"], tokens=None)
        return directory

    return execute


def names(data):
    found = find(data)
    return found.where, [(each.kind, each.name) for each in found.sets]


def test_of_a_corpus_the_test_split_is_measured_and_said(tmp_path, write):
    write("validation/image-short/mine")
    assert names(tmp_path) == (f"the validation split of {tmp_path}", [("image-short", "mine")])
    write("train/image-short/mine")
    write("test/text-pairs/other", "text-pairs")
    write("test/image-long/mine", "image-long")
    assert names(tmp_path) == (
        f"the test split of {tmp_path}", [("image-long", "mine"), ("text-pairs", "other")],
    )  # fmt: skip


@pytest.mark.parametrize("place", ["", "validation", "validation/image-short", "validation/image-short/mine"])
def test_what_an_import_wrote_is_found_from_every_folder_above_it(tmp_path, write, place):
    write("validation/image-short/mine")
    assert names(tmp_path / place)[1] == [("image-short", "mine")]


def test_no_two_data_sets_have_one_name(tmp_path, write):
    write("validation/image-long/mine", "image-long")
    write("validation/image-short/mine")
    write("validation/image-short/again", source="mine")
    found = find(tmp_path).sets
    assert len({each.name for each in found}) == 3
    assert found[0].name == "mine"
    assert found[0].kind == "image-short", "what short captions are measured on comes first"


def test_places_without_held_out_data_are_one_message(tmp_path, write):
    with pytest.raises(UserError, match="there is no folder"):
        find(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no held-out data sets. Expected"):
        find(tmp_path)
    write("train/image-short/mine")
    with pytest.raises(UserError, match="the train split that it has is what models learn from"):
        find(tmp_path)
    with pytest.raises(UserError, match="is an address"):
        find("s3://bucket/corpus")
    (write("validation/image-short/mine") / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000\.tar"):
        find(tmp_path)


def test_long_captions_count_where_they_are_what_the_data_set_is_of(write):
    captions = (("long and short", "long"), ("a word", "name"))
    assert Pool.open(write("a/image-long/mine", "image-long", captions=captions)).all_texts() == [
        "a word", "long and short",
    ]  # fmt: skip
    assert Pool.open(write("a/image-short/mine", captions=captions)).all_texts() == ["a word"]


def test_a_pool_without_captions_to_measure_is_refused_by_name(write):
    with pytest.raises(UserError, match="captions of the role keywords alone; expected captions of the role name or"):
        Pool.open(write("a/image-short/mine", captions=(("a", "keywords"),)))


REFUSALS = """
import sys
from stage_trainer.cli import main
words = ["--recipe", *sys.argv[1:]]
train = ["train", "--stage", "1"]
codes = [main([*command, *words]) for command in (["plan"], [*train, "--dry-run"], train)]
sys.exit(codes != [2, 2, 2] or "torch" in sys.modules)
"""


def refused(recipes, corpus, best, *more):
    """What `plan`, `train --dry-run` and `train` say, all without PyTorch."""
    words = [
        str(recipes / "drawn.yaml"), f"corpus={corpus}", f"output={corpus / 'run'}", f"checkpoint.best={best}", *more
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", REFUSALS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""
    first, second, third = done.stderr.splitlines()
    assert first == second == third
    assert not (corpus / "run").exists()
    return first


POOLS = "evaluation={every: 2, pools: [image-short/mine, text-pairs/mine, image-long/mine]}"


@pytest.mark.parametrize(
    ("best", "near"),
    [
        ("validation_recall_at_5_main/text to image", "validation_recall_at_5_mine/text to image"),
        ("validation_recall_at_5_mine/text_to_image", "validation_recall_at_5_mine/text to image"),
        ("validation_recall_at_5_mine/text to image/de", "validation_recall_at_5_mine/text to image/en"),
        ("validation_ndcg_at_10_mine", "validation_ndcg_at_10_mine/mean"),
        ("modality_gap/mine-image-lang", "modality_gap/mine-image-long"),
    ],
)
def test_a_best_that_no_data_set_measures_is_refused_by_every_command(recipes, tmp_path, write, best, near):
    for kind in ("image-short", "text-pairs", "image-long"):
        write(f"validation/{kind}/mine", kind)
    said = refused(recipes, tmp_path, best, POOLS)
    assert f"checkpoint.best is {best!r}, which nothing measures; did you mean" in said
    assert repr(near) in said


def test_a_best_that_is_measured_or_may_be_is_not_refused(recipes, tmp_path, write):
    def check(best, pools=POOLS):
        check_best_of(
            load(recipes / "drawn.yaml", [f"corpus={tmp_path}", f"checkpoint.best={best}", pools]).recipe, [1]
        )

    check("validation_recall_at_5_other/text to image")  # the data are not here
    for kind in ("image-short", "text-pairs", "image-long"):
        write(f"validation/{kind}/mine", kind)
    check("validation_recall_at_5_mine/text to image/en")
    check("validation_ndcg_at_5_mine-image-long/text to image")
    check("validation_spearman_mine/all")
    check("validation_recall_at_5_other/text to image", "evaluation={every: 2, pools: ['s3://bucket/other']}")
    with pytest.raises(UserError, match="nothing measures"):
        check("validation_recall_at_5_other/text to image")


def test_a_best_by_a_language_without_hidden_words_is_refused(recipes, tmp_path, write):
    def check(best, data="text-pairs/mine"):
        settings = [f"corpus={tmp_path / 'corpus'}", f"checkpoint.best=validation_loss_masked_lm/{best}"]
        settings += [f"data.masked_lm=[{data}]", "evaluation.every=2"]
        check_best_of(load(recipes / "masked-lm.yaml", settings, 1).recipe, [1])

    check("fr")  # the corpus is not here
    (tmp_path / "corpus").mkdir()
    check("fr")  # the data set is not: the run says so
    with pytest.raises(UserError, match="there are no held-out data for this stage"):
        check("en", "'s3://bucket/mine'")  # without splits
    write("corpus/train/text-pairs/mine", "text-pairs")
    with pytest.raises(UserError, match="there are no held-out data for this stage"):
        check("en")
    write("corpus/validation/text-pairs/mine", "text-pairs")
    check("en")
    check("all")
    with pytest.raises(UserError, match="did you mean 'validation_loss_masked_lm/en'"):
        check("fr")


def test_an_image_of_more_pixels_than_the_recipe_allows_is_refused_before_the_first_step(write, tmp_path):
    """The fixture's has 192."""
    directory = write("validation/image-short/mine")
    said = f"{directory}, sample s is 16x12 pixels, more than the 191 allowed; shrink it or raise max_pixels"
    assert len(Pool.open(directory, 192).images) == 1
    with pytest.raises(ValueError, match=re.escape(said)):
        Pool.open(directory, 191)
    engine = SimpleNamespace(forward_share=lambda: (0, 1))
    with pytest.raises(ValueError, match=re.escape(said)):
        PoolValidation(DataConfig(str(tmp_path), RemoteConfig(), 0, 191), ["image-short/mine"], engine)


def test_the_largest_limit_of_a_recipe_is_what_pillow_opens():
    assert OF_RECIPE["max_pixels"].high == MAX_PIXELS
