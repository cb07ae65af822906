"""What a stage reads from the disk in the place of images, or beside texts, is what it was meant to read."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter, ShardUnavailable
from PIL import Image
from stage_trainer.checkpoint.load import compatible
from stage_trainer.checkpoint.resume import settings
from stage_trainer.checkpoint.state import RunState
from stage_trainer.commands.ask_teacher import check_teacher
from stage_trainer.errors import UserError
from stage_trainer.files import fingerprint_of
from stage_trainer.recipe.read import load
from stage_trainer.tasks import make_task
from stage_trainer.tasks.frozen_tower import Pass, keep_embeddings
from vision_tower import VisionTower, VisionTowerConfig

EN = {"language": "en"}
FROZEN = ("trainable.image=none", "patch_dropout=[[0, 0]]", "embedding_cache={here}/kept")
TAUGHT = ("batch={image_text: 0, text: 4}", "teacher={model: {here}/teacher, folder: {here}/said}")


@pytest.fixture
def recipe(tmp_path, recipes):
    """A recipe over twelve captioned images and twelve pairs of texts, in shards of five."""
    rng = np.random.default_rng(0)
    for kind in ("image-short", "text-pairs"):
        with DatasetWriter(tmp_path / "train" / kind / "made", kind=kind, source="made", samples_per_shard=5) as writer:
            for number in range(12):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (20 + number, 40, 3), np.uint8)).save(picture, "png")
                text = [{"text": f"text {number}", **EN}]
                content = {"captions": text} if kind == "image-short" else {"query": text, "target": text}
                images = {"png": picture.getvalue()} if kind == "image-short" else {}
                writer.write(f"s{number}", {**images, "json": json.dumps(content).encode()}, languages=["en"], tokens=4)

    def execute(*more):
        overrides = [
            f"corpus={tmp_path}", "batch={image_text: 8, text: 4}", "resolution=[[0, 16]]",
            "data={image_text: [{path: image-short/made}], text: [{path: text-pairs/made}]}",
            *(setting.replace("{here}", str(tmp_path)) for setting in more),
        ]  # fmt: skip
        return load(recipes / "drawn.yaml", overrides, 1).recipe

    return execute


def batches_of(recipe):
    return make_task(recipe, 1).make_batches(lambda texts, max_length: [[0, 3, 2] for _ in texts], 0, 1)


def tower_of(**more):
    torch.manual_seed(0)
    return VisionTower(VisionTowerConfig(resolution=16, patch=8, width=64, layers=1, heads=2, mlp_width=24, **more))


def keep(recipe, tower, batches=None):
    """Batches with what the tower gives, from the disk."""
    batches = batches or batches_of(recipe)
    how = Pass(16, "fp32", torch.device("cpu"))
    keep_embeddings(tower, batches, recipe.stage(1), how, contextlib.nullcontext)
    return batches


@pytest.mark.parametrize("more", [{}, {"crop_mode": "squash", "interpolation": "bilinear"}, {"crop_pct": 0.8}])
def test_the_first_view_is_what_the_tower_takes_in_inference(recipe, more):
    """Whether it is kept on the disk or not."""
    from stage_trainer.data.frozen_images import inference_of

    tower = tower_of(**more)
    data = Dataset.open(recipe().corpus + "/train/image-short/made")
    expected = {data.row(n).key: tower.preprocess(data.read(n)["png"]) for n in range(len(data))}
    plain, kept = (batches_of(recipe("augmentation.views=1", *cached)) for cached in ((), FROZEN))
    for batches in (plain, kept):
        batches.inference = inference_of(tower.config)
    keep(recipe("augmentation.views=1", *FROZEN), tower, kept)
    (shown, _), (stored, _) = plain[0], kept[0]
    assert all(any(torch.equal(image, one) for one in expected.values()) for image in shown.images)
    with torch.no_grad():
        torch.testing.assert_close(stored.images, tower(tower.normalize(shown.images)), rtol=1e-4, atol=1e-5)


def test_a_tower_whose_preprocessing_or_weights_changed_gets_a_folder_of_its_own(recipe, tmp_path):
    keep(recipe("augmentation.views=1", *FROZEN), tower_of())
    keep(recipe("augmentation.views=1", *FROZEN), tower_of())
    assert len(list((tmp_path / "kept").iterdir())) == 1
    other = tower_of()
    with torch.no_grad():
        other.norm.bias += 1e-6
    towers = [tower_of(mean=(0.5, 0.5, 0.5)), tower_of(crop_pct=0.9), tower_of(lora_rank=2), other]
    for number, tower in enumerate(towers, 2):
        keep(recipe("augmentation.views=1", *FROZEN), tower)
        assert len(list((tmp_path / "kept").iterdir())) == number
    # Which images are too large is said in what is kept.
    found = keep(recipe("augmentation.views=1", *FROZEN, "max_pixels=1000"), tower_of())
    (store,) = found.frozen.stores.values()
    assert ["more than the 1,000 allowed" in str(store.of(n)) for n in range(12)] == [20 + n > 25 for n in range(12)]
    again = keep(recipe("augmentation.views=1", *FROZEN), tower_of())
    (store,) = again.frozen.stores.values()
    assert not any(isinstance(store.of(n), str) for n in range(12))


def test_a_shard_that_cannot_be_fetched_today_is_not_kept_as_unusable(recipe, monkeypatch, tmp_path):
    batches = batches_of(recipe("augmentation.views=1", *FROZEN))
    whole = Dataset.read

    def read(self, index):
        if self.shard_of(index) == 1:
            raise ShardUnavailable("00001.tar: 503")
        return whole(self, index)

    monkeypatch.setattr(Dataset, "read", read)
    with pytest.raises(UserError, match=r"00001\.tar: 503"):
        keep(recipe("augmentation.views=1", *FROZEN), tower_of(), batches)
    (folder,) = (tmp_path / "kept").iterdir()
    assert [path.name for path in folder.glob("0*.json")] == ["000000.json"]
    monkeypatch.undo()
    found = keep(recipe("augmentation.views=1", *FROZEN), tower_of())
    (store,) = found.frozen.stores.values()
    assert not any(isinstance(store.of(n), str) for n in range(12))


def say(recipe, weights, max_tokens=32, width=64):
    """What a teacher with these weights would have `stage-trainer embed` write."""
    for said in batches_of(recipe).taught:
        for store in said.stores.values():
            store.note_maker(said.maker(weights, max_tokens))
            for shard in store.missing():
                store.write(shard, np.ones((store.data.shard_sizes[shard], 1, width), np.float32), {})


def forget(tmp_path):
    for path in (tmp_path / "said").rglob("*.*"):
        path.unlink()


def test_a_run_does_not_go_on_with_what_another_teacher_says(recipe, tmp_path):
    taught = recipe(*TAUGHT)
    say(taught, "one")
    begun = RunState(settings(taught, 1), batches_of(taught).fingerprint, {})
    former = json.loads(json.dumps(begun.state_dict()))
    compatible(former, begun, tmp_path)
    with pytest.raises(UserError, match="made by other weights or settings .*one.*; now .*two"):
        say(taught, "two")
    forget(tmp_path)
    with pytest.raises(UserError, match="run `stage-trainer embed` with this recipe and stage"):
        batches_of(taught).fingerprint  # noqa: B018
    say(taught, "two")
    now = RunState(settings(taught, 1), batches_of(taught).fingerprint, {})
    with pytest.raises(UserError, match="text-pairs/made was .*, taught by .*/teacher .*one.* and is now .*two"):
        compatible(former, now, tmp_path)
    # A folder may be moved, and the exchange of ranks changes rounding alone.
    moved = dataclasses.replace(taught.stage(1).teacher, folder="elsewhere")
    ring = dataclasses.replace(taught.stage(1).loss, exchange="ring")
    stage = dataclasses.replace(taught.stage(1), teacher=moved, loss=ring)
    assert settings(dataclasses.replace(taught, stages=(stage,)), 1) == settings(taught, 1)


def test_what_nobody_is_known_to_have_said_is_not_taken_for_a_teachers(recipe, tmp_path):
    taught = recipe(*TAUGHT)
    say(taught, "one")
    next((tmp_path / "said").rglob("maker.json")).unlink()
    with pytest.raises(UserError, match="nobody knows whose"):
        say(taught, "one")


def test_a_teacher_that_is_here_is_the_one_that_spoke(recipe, tmp_path):
    taught = recipe(*TAUGHT)
    check_teacher(taught, 1)  # it is not here
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text('{"format": "trilith/1"}')
    say(taught, fingerprint_of(tmp_path / "teacher"))
    check_teacher(taught, 1)
    with pytest.raises(UserError, match=r"max_tokens.* 32.*; now .*max_tokens.* 16"):
        check_teacher(recipe(*TAUGHT, "max_tokens=16"), 1)
    (tmp_path / "teacher/config.json").write_text('{"format": "trilith/2"}')
    with pytest.raises(UserError, match="was made by other weights or settings"):
        check_teacher(taught, 1)


def test_the_vectors_of_all_data_sets_are_one_teachers_of_texts_of_one_length(recipe):
    taught = recipe(*TAUGHT)
    say(taught, "one")
    (found,) = batches_of(taught).taught
    assert found.check("one", 32) == 64
    with pytest.raises(UserError, match=r"max_tokens.* 32.*; now .*max_tokens.* 16"):
        found.check("one", 16)
    with pytest.raises(UserError, match=r"weights.*one.*; now .*weights.*two"):
        found.check("two", 32)
