"""Images and captions with what a teacher says of them: the rows of a batch, the loss over them, what is asked."""

import io
import json

import numpy as np
import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.batch import Batch, Embedded
from stage_trainer.checkpoint.resume import settings
from stage_trainer.commands import ask_teacher
from stage_trainer.data.samples import SampleCache
from stage_trainer.data.taught_images import TaughtCaptions, TaughtImages
from stage_trainer.errors import UserError
from stage_trainer.recipe import LossConfig
from stage_trainer.recipe.read import load
from stage_trainer.recipe.teacher import TeacherConfig
from stage_trainer.tasks import make_task
from stage_trainer.tasks.distill import DistillObjective

from .conftest import make_model

SAMPLES = 6
LANGUAGES = ("de", "en")


def picture(number):
    """One shade, by which it is known whatever crop of it is shown."""
    found = io.BytesIO()
    Image.new("RGB", (20, 20), (20 * number,) * 3).save(found, "png")
    return found.getvalue()


def captions(number):
    """One, or one more in another language; odd samples have the English one last."""
    some = [{"text": f"{number} {LANGUAGES.index(language)}", "language": language} for language in LANGUAGES]
    return some if number % 2 else some[::-1][: 1 + number // 2 % 2]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "train/image-short/made"
    with DatasetWriter(folder, kind="image-short", source="made") as writer:
        for number in range(SAMPLES):
            # What the data call "teacher" themselves is none of ours.
            content = {"captions": [{**one, "teacher": "her"} for one in captions(number)], "teacher": "him"}
            members = {"png": picture(number), "json": json.dumps(content).encode()}
            writer.write(f"s{number}", members, languages=["en"], tokens=None)
    return tmp_path


@pytest.fixture
def batches(corpus, recipes):
    """Those of a stage whose teacher says [sample, 9] of an image and [sample, language] of a caption, without those
    that it could not read."""

    def execute(of="[images, captions]", *more, size=6, rank=0, world=1, unread=()):
        more = [f"corpus={corpus}", f"batch={{image_text: {size}}}", "data={image_text: [{path: image-short/made}]}",
                f"teacher={{model: m, folder: {corpus}/said, of: {of}}}", *more]  # fmt: skip
        recipe = load(recipes / "drawn.yaml", more, 1).recipe
        found = make_task(recipe, 1).make_batches(
            lambda texts, max_length: [[0, *(3 + int(word) for word in text.split()), 2] for text in texts], rank, world
        )
        for said in found.taught:
            (store,) = said.stores.values()
            rows = np.zeros((SAMPLES, 2, 2), np.float32)
            for number in range(SAMPLES):
                questions = said.questions(store.data, number)
                known = {text: [float(word) for word in text.split()] for text in questions if isinstance(text, str)}
                for place, question in enumerate(questions):
                    rows[number, place] = known.get(question, [number, 9])
            store.write(0, rows, {number: f"{said.of} of s{number}: of no use" for number in unread})
        return found

    return execute


def shown(batch):
    """(sample of each image; sample and language of each caption)"""
    numbers = (batch.images.float().mean((1, 2, 3)) / 20).round().int().tolist()
    return numbers, (batch.texts.ids.view(-1, 4)[:, 1:3] - 3).tolist()


def test_each_image_and_caption_has_what_the_teacher_says_of_it(batches):
    found, languages = batches(), set()
    for step in range(4):
        batch, _ = found[step]
        images, texts = shown(batch)
        assert batch.teacher["images"].tolist() == [[number, 9] for number in images]
        assert batch.teacher["captions"].tolist() == texts
        languages |= {language for _, language in texts}
    assert languages == {0, 1}


def test_captions_of_all_languages_have_what_the_teacher_says_of_the_one_in_its_own(batches):
    found = batches("[captions]", "teacher.language=en")
    for step in range(4):
        batch, _ = found[step]
        assert batch.teacher["captions"].tolist() == [[number, 1] for number, _ in shown(batch)[1]]
        assert list(batch.teacher) == ["captions"]


def test_a_sample_that_the_teacher_could_not_read_is_replaced_and_named(batches):
    batch, drawn = batches(unread=[2])[0]
    assert 2 not in shown(batch)[0]
    assert [(entry.key, entry.reason) for entry in drawn.corrupt] == [("s2", "images of s2: of no use")]


def test_a_rank_without_images_takes_part_in_the_loss(batches):
    batch, _ = batches(size=2, rank=2, world=3)[0]
    assert {what: list(rows.shape) for what, rows in batch.teacher.items()} == {"images": [0, 2], "captions": [0, 2]}


def test_what_no_loss_reads_is_not_in_the_batch(batches):
    images, _ = batches("[images]", "teacher.alone=true", "trainable.text=none")[0]
    assert (images.texts, len(images.images), images.captions) == (None, 6, 0)
    texts, _ = batches("[captions]", "teacher.alone=true", "trainable.image=none")[0]
    assert (texts.images, texts.captions, len(texts.image_ids)) == (None, 6, 6)


def test_of_shards_without_an_index_nothing_is_said_and_their_own_json_is_not_asked(corpus, recipes):
    """Beside text pairs that have a teacher."""
    with DatasetWriter(corpus / "train/text-pairs/made", kind="text-pairs", source="made") as writer:
        for number in range(4):
            pair = {side: [{"text": str(number), "language": "en"}] for side in ("query", "target")}
            writer.write(f"p{number}", {"json": json.dumps(pair).encode()}, languages=["en"], tokens=None)
    (shard,) = (corpus / "train/image-short/made").glob("*.tar")
    more = [f"corpus={corpus}", "batch={image_text: 3, text: 3}", f"teacher={{model: m, folder: {corpus}/said}}",
            f"data={{image_text: [{{path: {shard}}}], text: [{{path: text-pairs/made}}]}}"]  # fmt: skip
    found = make_task(load(recipes / "drawn.yaml", more, 1).recipe, 1).make_batches(
        lambda texts, max_length: [[0, 3, 2] for _ in texts], 0, 1
    )
    for said in found.taught:
        (store,) = said.stores.values()
        store.write(0, np.ones((4, 1, 2), np.float32), {})
    batch, _ = found[0]
    assert {what: list(rows.shape) for what, rows in batch.teacher.items()} == {"texts": [3, 2]}
    assert batch.captions == 3


def plain(ours, wanted, kind):
    """The teacher's loss, by torch's own cosines."""
    if kind == "cosine":
        return (1 - torch.cosine_similarity(ours[:, : wanted.shape[1]], wanted)).mean()
    cosines = [torch.cosine_similarity(rows[:, None], rows[None], dim=-1) for rows in (ours, wanted)]
    return (cosines[0] - cosines[1]).square()[~torch.eye(len(ours), dtype=torch.bool)].mean()


@pytest.mark.parametrize("kind", ["cosine", "relational"])
@pytest.mark.parametrize("of", [("images",), ("captions",), ("captions", "images")])
@pytest.mark.parametrize("views", [0, 2])
def test_the_loss_is_over_images_and_captions_together(kind, of, views):
    """A relational one compares images with captions, too. Views of a unified loss, and text pairs, are left alone."""
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (4 * (1 + views), 4 + 2 * 3))
    said = {what: torch.randn(4, 9, generator=g, dtype=torch.float64) for what in of}
    seeds, ids = torch.arange(0), torch.arange(4)
    batch = Batch(
        None, seeds, None, torch.arange(10), image_ids=ids, text_ids=ids[:3], pairs=3, negatives=0, teacher=said
    )
    teacher = TeacherConfig(model="m", folder="f", loss=kind, of=of, weight=2.0)
    objective = DistillObjective(make_model(), LossConfig(dims=(16,)), "fp32", teacher)
    found, expected = [], []
    for own in (found, expected):
        leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
        if own is found:
            loss = 2.0 * objective.image_text_loss(Embedded(*leaves, {}), batch, None)
        else:
            rows = {"images": leaves[0][:4], "captions": leaves[1][:4]}
            loss = 2.0 * plain(torch.cat([rows[what] for what in of]), torch.cat([said[what] for what in of]), kind)
        own += [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]
    for one, other in zip(found, expected, strict=True):
        zeros = torch.zeros(()) if other is None else torch.zeros_like(other)
        torch.testing.assert_close(
            zeros if one is None else one, zeros if other is None else other, rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("language", [None, "de"])
def test_all_that_is_asked_of_a_shard_is_kept_in_its_place(corpus, monkeypatch, language):
    """In parts of three questions; without German captions a sample is of no use, and an image that is too large."""
    monkeypatch.setattr(ask_teacher, "CHUNK", 3)
    data, sizes = Dataset.open(corpus / "train/image-short/made"), []

    def answers(parts):
        rows = []
        for part in parts:
            sizes.append(len(part))
            rows += [
                [float(word) for word in text.split()] if isinstance(text, str) else [len(text), 9] for text in part
            ]
        return np.array(rows, np.float32)

    teacher = TeacherConfig(model="m", folder=str(corpus / "said"), language=language, of=("captions",))
    said = TaughtCaptions(teacher, [data], SampleCache(0))
    (store,) = said.stores.values()
    vectors, unusable = ask_teacher._answers(ask_teacher.Teacher("m", "", {"captions": answers}), store, 0, said)
    for number in range(SAMPLES):
        wanted = [one["text"] for one in captions(number) if language in (None, one["language"])]
        if not wanted:
            assert "sample s" + str(number) + " has no caption in 'de', which the teacher reads" in unusable[number]
        for place, row in enumerate(vectors[number]):
            assert row.tolist() == ([float(w) for w in wanted[place].split()] if place < len(wanted) else [0, 0])
    assert (vectors.shape[1], bool(unusable)) == ((1, True) if language else (2, False))
    assert set(sizes[:-1]) == {3}

    small = TaughtImages(teacher, [data], SampleCache(0, max_pixels=399))
    with pytest.raises(UserError, match="no sample of shard 0 .*more than the 399 allowed"):
        ask_teacher._answers(ask_teacher.Teacher("m", "", {"images": answers}), store, 0, small)


def test_a_run_that_texts_were_taught_goes_on_as_before_images_could_be(recipes):
    """Its settings have no teacher.of; those of a run that learned of images have."""
    for of, there in (("[texts]", False), ("[images]", True), ("[texts, images]", True)):
        recipe = load(recipes / "drawn.yaml", [f"teacher={{model: m, folder: f, of: {of}}}"], 1).recipe
        assert ("stage.teacher.of" in settings(recipe, 1)) == there
