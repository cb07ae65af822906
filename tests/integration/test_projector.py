"""A trainable projector on a frozen image tower of another width: trained, kept, exported, and opened elsewhere."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from vision_tower import VisionTower, VisionTowerConfig

COMMON = (
    "steps=8", "warmup_steps=0", "evaluation.every=0", "checkpoint.every=3", "checkpoint.keep=9", "log_every=1",
    "patch_dropout=[[0, 0]]", "resolution=[[0, 32]]", "augmentation.views=1", "trainable.image=projector",
    "batch={image_text: 16}",
)  # fmt: skip
CACHED = ("embedding_cache=kept",)


@pytest.fixture
def other(tmp_path):
    """A finished image tower that is 32 wide, beside texts of 64."""
    torch.manual_seed(0)
    shape = {"resolution": 32, "patch": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
    tower = VisionTower(VisionTowerConfig(**shape))
    tower.save_pretrained(tmp_path / "other")
    return tower


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
    for form in ("common", "jina-clip"):
        said = run("stage-trainer", "export", "with/stage1", form, "--format", form, fails=True).stderr
        assert "the image tower has a projector" in said


def test_a_new_projector_that_nothing_trains_is_refused(other, train):
    said = train(1, *recipe("linear"), "trainable.image=none", fails=True).stderr
    assert "the weights have no projector" in said
    assert "set it to 'projector'" in said


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
        (("model.vision.projector_hidden=8",), "projector_hidden is 8 and projector 0"),
        (("embedding_cache=kept", "augmentation.views=1", "patch_dropout=[[0, 0]]"), "perhaps to 'projector'"),
    ):
        with pytest.raises(UserError, match=message):
            load(train.recipe, settings, 1)
