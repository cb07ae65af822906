"""A frozen image tower runs once over a stage's images: the curve with its embeddings from the disk is the same."""

import json
import shutil

import numpy as np
import pytest
from stage_trainer.cli import main
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load

FROZEN = (
    "steps=8", "warmup_steps=0", "evaluation.every=0", "checkpoint.every=3", "checkpoint.keep=9", "log_every=1",
    "trainable.image=none", "patch_dropout=[[0, 0]]", "model.text.dropout=0.1", "max_corrupt=0.2",
    "resolution=[[0, 32], [5, 40]]",
)  # fmt: skip
CACHED = ("embedding_cache=kept",)
TAGS = ("loss/image_text", "loss/text", "temperature/image_text")


def curve(scalars, output):
    return {tag: scalars(f"{output}/stage1", tag) for tag in TAGS}


def assert_equal(found, expected):
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag


@pytest.mark.parametrize("views", [1, pytest.param(3, marks=pytest.mark.full)])
def test_the_curve_with_embeddings_from_the_disk_is_the_one_without(train, run, scalars, tmp_path, views):
    settings = (*FROZEN, f"augmentation.views={views}")
    train(1, *settings, output="without")
    expected = curve(scalars, "without")
    out = train(1, *settings, *CACHED, output="with").stdout
    assert out.count("the frozen image tower runs once") == 2  # each resolution has its own
    assert_equal(curve(scalars, "with"), expected)
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.full
def test_a_resume_ranks_and_chunks_read_what_is_there(train, scalars, tmp_path):
    settings = (*FROZEN, "augmentation.views=1")
    train(1, *settings, *CACHED, output="with")
    expected = curve(scalars, "with")
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    # A resume from the first resolution, two ranks, and gradient caching read what is there.
    for saved in sorted((tmp_path / "with/stage1").glob("step-*"))[1:]:
        shutil.rmtree(saved)
    out = train(1, *settings, *CACHED, output="with").stdout
    out += train(1, *settings, *CACHED, "gradient_cache={images: 7, tokens: 200}", output="ranks", ranks=2).stdout
    assert "runs once" not in out
    for output in ("with", "ranks"):
        found = curve(scalars, output)
        for tag, values in expected.items():
            assert found[tag] == pytest.approx(values, rel=1e-5), (output, tag)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == kept


@pytest.mark.full
def test_embeddings_are_made_beforehand_and_again_only_where_they_do_not_fit(train, run, scalars, tmp_path):
    settings = (*FROZEN, "augmentation.views=1", "resolution=[[0, 32]]")
    train(1, *settings, output="without")
    recipe = ["--recipe", train.recipe, "--stage", 1, "corpus={corpus}", "model.tokenizer={corpus}/tokenizer.model"]
    said = run("stage-trainer", "embed", *recipe, "output=with", *settings, *CACHED).stdout
    assert "the frozen image tower runs once" in said
    (made,) = (tmp_path / "kept").iterdir()
    origin = json.loads((made / "origin.json").read_text())
    assert (origin["resolution"], origin["precision"], origin["views"]) == (32, "fp32", 1)
    arrays = sorted(made.glob("*.npy"))
    first = np.load(arrays[0])
    assert first.dtype == np.float32
    assert first.shape[1:] == (1, 64)
    written = [path.stat().st_mtime_ns for path in arrays]
    assert "runs once" not in train(1, *settings, *CACHED, output="with").stdout
    assert_equal(curve(scalars, "with"), curve(scalars, "without"))
    # A byte that changed is found, and that shard alone made again; what lacks its sidecar was not finished.
    raw = bytearray(arrays[0].read_bytes())
    raw[-1] ^= 1
    arrays[0].write_bytes(raw)
    assert "runs once" in train(1, *settings, *CACHED, output="again").stdout
    assert np.array_equal(np.load(arrays[0]), first)
    assert [path.stat().st_mtime_ns for path in arrays][1:] == written[1:]
    assert_equal(curve(scalars, "again"), curve(scalars, "without"))
    # Other weights, and other precision, have a folder of their own.
    train(1, *settings, *CACHED, "seed=1", output="seed")
    train(1, *settings, *CACHED, "precision=bf16", "device=cpu", output="bf16")
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_what_contradicts_a_cache_is_refused(train, capsys):
    for setting, message in (
        ("trainable.image=all", "trainable.image is 'all' and trainable.text 'all'; set one to 'none'"),
        ("augmentation.views=0", "augmentation.views is 0, so every draw of an image is another; set it to 1 or more"),
        ("patch_dropout=[[0, 0.5]]", "'patch_dropout' is above 0; leave it out"),
        ("augmentation={views: 1, flip: true}", "augmentation.views is 1, the image as it is"),
        ("loss.kind=unified", "loss.image_views is true; set it to false"),
    ):
        with pytest.raises(UserError) as error:
            load(train.recipe, [*FROZEN, "augmentation.views=1", *CACHED, setting], 1)
        assert message in str(error.value)
    assert main(["embed", "--recipe", str(train.recipe), "--stage", "1", *FROZEN, "augmentation.views=1"]) == 2
    assert "stage 1 reads no embeddings from the disk" in capsys.readouterr().err


@pytest.mark.full
def test_an_image_that_cannot_be_read_is_replaced_as_without_a_cache(train, scalars, copy_of_corpus):
    tar = sorted((copy_of_corpus / "train/image-short/drawn").glob("*.tar"))[0]
    raw = bytearray(tar.read_bytes())
    raw[2000] ^= 255
    tar.write_bytes(raw)
    settings = (*FROZEN, "augmentation.views=1", "resolution=[[0, 32]]", f"corpus={copy_of_corpus}")
    for output, more in (("without", ()), ("with", CACHED)):
        train(1, *settings, *more, output=output)
    assert_equal(curve(scalars, "with"), curve(scalars, "without"))
