"""Triplets with a teacher's scores: which texts they are of, and what is refused."""

import json

import numpy as np
import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter, ShardError, Unusable
from stage_trainer.data.samples import SampleCache
from stage_trainer.data.scored_texts import OwnScores, ScoredTexts
from stage_trainer.data.taught import with_said
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.recipe.teacher import TeacherConfig
from stage_trainer.tasks import make_task


def both(words):
    """A text in two languages."""
    return [{"text": f"{words} {language}", "language": language} for language in ("de", "en")]


def triplet(negatives=2, **more):
    parts = {"query": both("q"), "target": both("t"), "negatives": [both(f"n{i}") for i in range(negatives)]}
    return {**parts, **more}


@pytest.fixture
def write(tmp_path):
    def execute(*contents, kind="text-triplets", name="made"):
        folder = tmp_path / "train" / kind / name
        with DatasetWriter(folder, kind=kind, source=name) as writer:
            for number, content in enumerate(contents):
                packed = {"json": json.dumps(content).encode()}
                writer.write(f"s{number}", packed, languages=["de", "en"], tokens=None)
        return Dataset.open(folder)

    return execute


def scored(tmp_path, data, language=None):
    teacher = TeacherConfig(model="m", folder=str(tmp_path / "said"), language=language, loss="margin_mse")
    taught = ScoredTexts(teacher, [data], SampleCache(0))
    (store,) = taught.stores.values()
    store.write(0, np.array([[[3, 1, 2]]] * len(data), np.float32), {})
    return taught


def attached(taught, data, index):
    """A sample's texts with what the teacher says of them."""
    return with_said([taught], data, index, SampleCache(0).sample(data, index)[1])


def test_without_a_language_the_student_reads_what_the_teacher_read(write, tmp_path):
    data = write(triplet(), triplet(3))
    taught = scored(tmp_path, data)
    assert taught.questions(data, 0) == [[("q de", "t de"), ("q de", "n0 de"), ("q de", "n1 de")]]
    texts = attached(taught, data, 0)
    assert torch.equal(texts["teacher"]["texts"], torch.tensor([3.0, 1, 2]))
    assert (texts["query"], texts["negatives"]) == (both("q")[:1], [both("n0")[:1], both("n1")[:1]])
    with pytest.raises(Unusable, match="3 negatives, and the first triplet has 2"):
        taught.questions(data, 1)


def test_scores_in_one_language_teach_all_of_them(write, tmp_path):
    data = write(triplet())
    taught = scored(tmp_path, data, "en")
    assert taught.questions(data, 0)[0][1] == ("q en", "n0 en")
    assert attached(taught, data, 0)["negatives"] == [both("n0"), both("n1")]
    assert (
        scored(tmp_path, data, "en").stores[data.directory].directory
        != scored(tmp_path, data).stores[data.directory].directory
    )
    french = ScoredTexts(TeacherConfig(model="m", folder="f", language="fr", loss="margin_mse"), [data], taught.cache)
    with pytest.raises(Unusable, match="not all texts in 'fr', which the teacher reads"):
        french.questions(data, 0)


def test_the_datas_own_scores_and_one_without_is_of_no_use(write):
    data = write(triplet(scores=[3, 1.5, 2]), triplet(), triplet(scores=[3, 1]), triplet(scores=[3, 1, True]))
    own = OwnScores([data], SampleCache(0))
    assert own.check("", 16) == 3
    assert torch.equal(attached(own, data, 0)["teacher"]["texts"], torch.tensor([3.0, 1.5, 2]))
    with pytest.raises(ShardError, match="sample s1 has no scores, and the recipe names no teacher.model"):
        attached(own, data, 1)
    for index in (2, 3):
        with pytest.raises(ShardError, match="its scores are not one for the target and one for each negative but a"):
            attached(own, data, index)


def test_what_is_no_triplet_and_data_sets_that_differ_are_refused(write):
    pairs = write({"query": both("q"), "target": both("t")}, kind="text-pairs")
    with pytest.raises(UserError, match="holds text-pairs, and teacher.loss 'margin_mse' compares"):
        OwnScores([pairs], SampleCache(0))
    two, three = write(triplet(2)), write(triplet(3), name="three")
    with pytest.raises(UserError, match="first triplet of .*three has 3 negatives and that of .*made 2"):
        OwnScores([two, three], SampleCache(0))


@pytest.mark.parametrize(("loss", "negatives"), [("margin_mse", 2), ("relational", 0)])
def test_hard_negatives_are_embedded_only_where_a_loss_reads_them(write, tmp_path, recipes, loss, negatives):
    write(*[triplet(scores=[3, 1, 2])] * 4, triplet(3))
    teacher = "{loss: margin_mse, alone: true}" if negatives else f"{{model: m, folder: f, loss: {loss}, alone: true}}"
    settings = (
        f"corpus={tmp_path}", "data={text: [{path: text-triplets/made}]}", "batch={text: 4}", f"teacher={teacher}",
    )  # fmt: skip
    task = make_task(load(recipes / "drawn.yaml", settings, 1).recipe, 1)
    batches = task.make_batches(lambda texts, max_length: [[0, len(words), 2] for words in texts], 0, 1)
    batches.taught = batches.taught if negatives else [OwnScores(batches.text_sources, SampleCache(0))]
    assert batches.hard_negatives == negatives
    batch, _ = batches[0]
    assert (batch.negatives, len(batch.texts.lengths)) == (negatives, 4 * (2 + negatives))
