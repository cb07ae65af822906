"""A trainable projector on a frozen tower of another width: trained, kept, exported, and opened elsewhere."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from text_tower import TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig

COMMON = (
    "steps=8", "warmup_steps=0", "evaluation.every=0", "checkpoint.every=3", "checkpoint.keep=9", "log_every=1",
    "patch_dropout=[[0, 0]]", "resolution=[[0, 32]]", "augmentation.views=1", "trainable.image=projector",
    "batch={image_text: 16}",
)  # fmt: skip
CACHED = ("embedding_cache=kept",)
ADAMW = ("optimizer={name: adamw}",)


@pytest.fixture
def other(tmp_path):
    """A finished image tower that is 32 wide, beside texts of 64."""
    torch.manual_seed(0)
    shape = {"resolution": 32, "patch": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
    tower = VisionTower(VisionTowerConfig(**shape))
    tower.save_pretrained(tmp_path / "other")
    return tower


@pytest.fixture
def texts(tmp_path):
    """A finished text tower that is 96 wide, beside images of 64."""
    torch.manual_seed(0)
    shape = {"vocab_size": 386, "width": 96, "layers": 1, "heads": 2, "mlp_width": 64, "max_length": 128}
    tower = TextTower(TextTowerConfig(**shape))
    tower.save_pretrained(tmp_path / "texts")
    return tower


JOINED = (
    *COMMON, "batch={image_text: 16, text: 16}", "trainable.text=projector", "model.vision_weights=other",
    "model.text_weights=texts", "model.vision={projector: 64}", "model.text={projector: 64, projector_hidden: 80}",
)  # fmt: skip
TAGS = ("loss/image_text", "loss/text", "gradient_norm/text", "gradient_norm/image")


def curve(scalars, output, tags=TAGS):
    return {tag: scalars(f"{output}/stage1", tag) for tag in tags}


def assert_equal(found, expected, rel):
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=rel), tag


def test_two_finished_models_are_joined_by_two_projectors_alone(other, texts, train, run, scalars, tmp_path):
    train(1, *JOINED, output="without")
    said = train(1, *JOINED, *CACHED, output="with").stdout
    assert said.count("tower runs once") == 3  # images, captions and text pairs
    assert_equal(curve(scalars, "with"), curve(scalars, "without"), 1e-6)
    run("stage-trainer", "export", "with/stage1", "ours", "--format", "trilith")
    model = DualEncoder.from_pretrained(tmp_path / "ours")
    first = DualEncoder.from_pretrained(sorted((tmp_path / "with/stage1").glob("step-*"))[0] / "model")
    for tower, before, at_first in ((model.text, texts, first.text), (model.vision, other, first.vision)):
        for name, weight in before.state_dict().items():  # the towers stay as they were
            assert torch.equal(tower.state_dict()[name], weight), name
        for name, weight in at_first.projector.state_dict().items():
            assert not torch.equal(tower.projector.state_dict()[name], weight), name

    images = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))
    words = ["a red circle", "ein blauer Stern"]
    assert model.encode_text(words).shape == (2, 64)
    assert (model.encode([*words, images[0]]) == 0).sum() == 0
    run("stage-trainer", "export", "with/stage1", "clip", "--format", "open-clip")
    import open_clip

    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        of_images = theirs.eval().encode_image(pixels, normalize=True)
        of_texts = theirs.encode_text(tokenizer(words), normalize=True)
    np.testing.assert_allclose(of_images.numpy(), model.encode_image(images), atol=1e-5)
    np.testing.assert_allclose(of_texts.numpy(), model.encode_text(words), atol=1e-5)


@pytest.mark.full
def test_ranks_zero_chunks_a_resume_and_a_teacher_go_on_with_two_projectors(
    other, texts, train, run, scalars, tmp_path
):
    train(1, *JOINED, *CACHED, output="one")
    expected = curve(scalars, "one")
    train(1, *JOINED, *CACHED, "gradient_cache={images: 5, tokens: 150}", output="ranks", ranks=2)
    for zero in (1, 2, 3):
        train(
            1,
            *JOINED,
            *CACHED,
            *ADAMW,
            f"deepspeed={{zero_optimization: {{stage: {zero}}}}}",
            output=f"z{zero}",
            ranks=2,
        )
    train(1, *JOINED, *ADAMW, output="adamw")
    for zero in (1, 2, 3):
        assert_equal(curve(scalars, f"z{zero}", TAGS[:2]), curve(scalars, "adamw", TAGS[:2]), 1e-4)
    for saved in sorted((tmp_path / "one/stage1").glob("step-*"))[1:]:
        shutil.rmtree(saved)
    train(1, *JOINED, *CACHED, output="one")
    for output in ("ranks", "one"):
        assert_equal(curve(scalars, output), expected, 1e-4)
    run("stage-trainer", "export", "adamw/stage1", "teacher", "--format", "trilith")
    taught = (
        *JOINED,
        "teacher={model: teacher, folder: said, language: en}",
        "batch={text: 16}",
        "trainable.image=none",
    )
    here = ("corpus={corpus}", "model.tokenizer={corpus}/tokenizer.model", "output=taught", *taught)
    run("stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *here)
    train(1, *taught, output="taught")
    train(1, *taught, *CACHED, output="kept-taught")
    assert_equal(curve(scalars, "kept-taught", ("loss/teacher",)), curve(scalars, "taught", ("loss/teacher",)), 1e-6)


def recipe(kind):
    hidden = 128 if kind == "mlp" else 0
    return (*COMMON, "model.vision_weights=other", f"model.vision={{projector: 64, projector_hidden: {hidden}}}")


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.full)])
def test_a_projector_trains_on_a_frozen_tower_of_another_width_and_is_exported(
    other, kind, train, run, scalars, tmp_path
):
    settings = recipe(kind)
    train(1, *settings, output="without")
    expected = scalars("without/stage1", "loss/image_text")
    train(1, *settings, *CACHED, output="with")
    assert scalars("with/stage1", "loss/image_text") == pytest.approx(expected, rel=1e-6)
    run("stage-trainer", "export", "with/stage1", "ours", "--format", "trilith")
    model = DualEncoder.from_pretrained(tmp_path / "ours")
    for name, weight in other.state_dict().items():  # the tower stays as it was, the projector does not
        assert torch.equal(model.vision.state_dict()[name], weight), name
    first = DualEncoder.from_pretrained(sorted((tmp_path / "with/stage1").glob("step-*"))[0] / "model").vision
    assert not torch.equal(first.projector.state_dict().popitem()[1], model.vision.projector.state_dict().popitem()[1])

    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    ours = model.encode_image(list(images))
    assert ours.shape == (3, 64)
    said = run("stage-trainer", "export", "with/stage1", "clip", "--format", "open-clip").stdout
    assert "for open_clip alone: Trilith reads a projector from --format trilith" in said
    with pytest.raises(UserError, match="timm_proj"):
        DualEncoder.from_pretrained(tmp_path / "clip")
    import open_clip

    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        found = theirs.eval().encode_image(pixels, normalize=True)
    np.testing.assert_allclose(found.numpy(), ours, atol=1e-5)
    said = run("stage-trainer", "export", "with/stage1", "jina", "--format", "jina-clip", fails=True).stderr
    assert "the image tower has a projector" in said


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_new_projector_that_nothing_trains_is_refused(other, texts, train, name):
    said = train(1, *JOINED, f"trainable.{name}=none", fails=True).stderr
    assert "the weights have no projector" in said
    assert f"trainable.{name} is 'none': set it to 'projector'" in said


@pytest.mark.full
def test_ranks_chunks_a_resume_and_the_next_stage_go_on_with_a_projector(other, train, scalars, tmp_path):
    settings = (*recipe("mlp"), *CACHED)
    train(1, *settings, output="one")
    expected = scalars("one/stage1", "loss/image_text")
    train(1, *settings, "gradient_cache={images: 5, tokens: 150}", output="ranks", ranks=2)
    for saved in sorted((tmp_path / "one/stage1").glob("step-*"))[1:]:
        shutil.rmtree(saved)
    train(1, *settings, output="one")
    for output in ("ranks", "one"):
        assert scalars(f"{output}/stage1", "loss/image_text") == pytest.approx(expected, rel=1e-4), output


def test_a_projector_that_is_missing_or_leads_elsewhere_is_refused(train):
    for settings, message in (
        (("model.vision.projector=32",), "texts have 64 numbers .* and images 32"),
        (("trainable.image=projector",), "model.vision.projector is 0; set it to the text tower's width"),
        (("trainable.text=projector",), "model.text.projector is 0; set it to the image tower's width"),
        (("model.text.projector=32",), "texts have 32 numbers .* and images 64 .*, or model.text.projector to 64"),
        (("model.vision.projector_hidden=8",), "projector_hidden is 8 and projector 0"),
        (("embedding_cache=kept", "augmentation.views=1", "patch_dropout=[[0, 0]]"), "to 'none' or 'projector'"),
    ):
        with pytest.raises(UserError, match=message):
            load(train.recipe, settings, 1)
