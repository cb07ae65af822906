"""A frozen text tower runs once over a stage's texts: the curve with its embeddings from the disk is the same."""

import json
import shutil

import pytest
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load

FROZEN = (
    "steps=8", "warmup_steps=0", "evaluation.every=0", "checkpoint.every=3", "checkpoint.keep=9", "log_every=1",
    "trainable={text: none}", "model.text.dropout=0", "resolution=[[0, 32]]", "patch_dropout=[[0, 0.5]]",
)  # fmt: skip
TRIPLETS = ("data.text=[{path: text-triplets/drawn}]",)
CACHED = ("embedding_cache=kept",)
TAGS = ("loss/image_text", "loss/text", "temperature/image_text", "gradient_norm/image")
SAID = "the frozen text tower runs once"


def curve(scalars, output):
    return {tag: scalars(f"{output}/stage1", tag) for tag in TAGS}


def assert_equal(found, expected, rel=1e-6):
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=rel), tag


def test_the_curve_with_texts_from_the_disk_is_the_one_without(train, scalars, tmp_path):
    settings = (*FROZEN, *TRIPLETS)
    train(1, *settings, output="without")
    out = train(1, *settings, *CACHED, output="with").stdout
    assert out.count(SAID) == 2  # captions and triplets
    assert_equal(curve(scalars, "with"), curve(scalars, "without"))
    cut = [tag for tag in scalars("without/stage1") if tag.startswith("texts_cut/")]
    assert len(cut) == 2
    for tag in cut:
        assert (found := scalars("with/stage1", tag)) == scalars("without/stage1", tag)
        assert max(found.values()) > 0
    assert SAID not in train(1, *settings, *CACHED, "seed=0", output="again").stdout
    (one, *_) = (tmp_path / "kept").iterdir()
    origin = json.loads((one / "origin.json").read_text())
    assert {"weights", "tokenizer", "max_tokens", "precision"} <= origin.keys()
    assert origin["precision"] == "fp32"


@pytest.mark.full
def test_ranks_chunks_a_resume_and_embed_read_what_is_there(train, run, scalars, tmp_path):
    settings = (*FROZEN, *TRIPLETS)
    recipe = ["--recipe", train.recipe, "--stage", 1, "corpus={corpus}", "model.tokenizer={corpus}/tokenizer.model"]
    assert run("stage-trainer", "embed", *recipe, "output=with", *settings, *CACHED).stdout.count(SAID) == 2
    out = train(1, *settings, *CACHED, output="with").stdout
    expected = curve(scalars, "with")
    for saved in sorted((tmp_path / "with/stage1").glob("step-*"))[1:]:
        shutil.rmtree(saved)
    out += train(1, *settings, *CACHED, output="with").stdout
    out += train(1, *settings, *CACHED, "gradient_cache={images: 5, tokens: 60}", output="ranks", ranks=2).stdout
    assert SAID not in out
    for output in ("with", "ranks"):
        assert_equal(curve(scalars, output), expected, 1e-4)
    # Where texts are cut is part of what was kept.
    assert train(1, *settings, *CACHED, "max_tokens=8", output="cut").stdout.count(SAID) == 2
    assert len(list((tmp_path / "kept").iterdir())) == 4


@pytest.mark.full
def test_both_towers_stand_still_and_a_projector_learns(train, scalars):
    settings = (
        *FROZEN, "patch_dropout=[[0, 0]]", "augmentation.views=1", "trainable={image: projector, text: none}",
        "model.vision.projector=64", "batch={image_text: 16}",
    )  # fmt: skip
    train(1, *settings, output="without")
    assert train(1, *settings, *CACHED, output="with").stdout.count("runs once") == 2
    expected = scalars("without/stage1", "loss/image_text")
    assert scalars("with/stage1", "loss/image_text") == pytest.approx(expected, rel=1e-6)


def test_dropout_that_would_say_something_else_at_each_draw_is_refused(train):
    with pytest.raises(UserError, match="texts that never change, and model.text.dropout is 0.1; set it to 0"):
        load(train.recipe, [*FROZEN, *CACHED, "model.text.dropout=0.1"], 1)
