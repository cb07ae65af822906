"""A model that learns from the scores of a cross-encoder, which `stage-trainer embed` made, or that the data have."""

import json
import shutil

import numpy as np
import pytest
import torch
from bert_words import cross_encoder
from data_prep.shards import Dataset, DatasetWriter

HERE = ("model.tokenizer={corpus}/tokenizer.model", "corpus={corpus}")
STEPS = 12
TRIPLETS = (
    "warmup_steps=0", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]", "patch_dropout=[[0, 0]]",
    f"steps={STEPS}", "seed=3", "lr.text=3e-3", "batch={image_text: 0, text: 16}",
    "data.text=[{path: text-triplets/drawn}]",
)  # fmt: skip
TAUGHT = (*TRIPLETS, "teacher={model: scorer, folder: said, loss: margin_mse}")


@pytest.fixture
def scorer(tmp_path):
    """A cross-encoder with random weights, in the folder that transformers writes."""
    model, tokenizer = cross_encoder(tmp_path / "scorer")

    def scores(content):
        """Logits of the first query with the first target and the first text of each negative, by transformers."""
        query, *others = [part[0]["text"] for part in (content["query"], content["target"], *content["negatives"])]
        found = []
        for other in others:
            inputs = tokenizer(query, other, return_tensors="pt", truncation=True)
            with torch.no_grad():
                found.append(model(**inputs).logits.item())
        return found

    return scores


def contents(data):
    return [json.loads(data.read(index)["json"]) for index in range(len(data))]


def with_scores(corpus, scores):
    """Puts scores into the triplets of a corpus that may change."""
    folder = corpus / "train/text-triplets/drawn"
    old = Dataset.open(folder)
    new = [(old.row(i).key, {**content, "scores": scores(content)}) for i, content in enumerate(contents(old))]
    shutil.rmtree(folder)
    with DatasetWriter(folder, kind=old.kind, source=old.source) as writer:
        for name, content in new:
            writer.write(name, {"json": json.dumps(content).encode()}, languages=["en"], tokens=None)


@pytest.mark.full
def test_margins_of_a_cross_encoder_are_learned_from_the_disk_and_from_the_data(
    scorer, train, run, scalars, tmp_path, drawn_corpus, copy_of_corpus
):
    assert "run `stage-trainer embed` with this recipe and stage" in train(1, *TAUGHT, fails=True).stderr
    embed = ["stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *HERE, *TAUGHT]
    assert "shard 1 of" in run(*embed).stderr
    assert "shard 1 of" not in run(*embed).stderr  # it is there
    data = Dataset.open(drawn_corpus / "train/text-triplets/drawn")
    stored = np.concatenate([np.load(path) for path in sorted((tmp_path / "said").glob("*/*.npy"))])
    expected = [scorer(content) for content in contents(data)]
    np.testing.assert_allclose(stored[:, 0], expected, atol=1e-5)

    train(1, *TAUGHT, "teacher.alone=true", output="alone")
    losses = scalars("alone/stage1", "loss/teacher")
    assert losses[STEPS - 1] < 0.8 * losses[0]
    assert "loss/text" not in scalars("alone/stage1")
    temperature = scalars("alone/stage1", "temperature/text")
    assert temperature[STEPS - 1] != temperature[0]
    # Beside the contrastive loss: in chunks, by two ranks, and with the scores in the data, one curve.
    train(1, *TAUGHT, "teacher.weight=2", output="beside")
    train(1, *TAUGHT, "teacher.weight=2", "gradient_cache={images: 0, tokens: 150}", output="ranks", ranks=2)
    with_scores(copy_of_corpus, scorer)
    own = (*TRIPLETS, "teacher={loss: margin_mse, weight: 2}", f"corpus={copy_of_corpus}")
    train(1, *own, output="own")
    for output in ("ranks", "own"):
        for tag in ("loss/teacher", "loss/text"):
            assert scalars(f"{output}/stage1", tag) == pytest.approx(scalars("beside/stage1", tag), rel=1e-4), tag
    # Other weights under the same name are not taken for those that were asked.
    config = tmp_path / "scorer/config.json"
    config.write_text(config.read_text() + "\n")
    assert "made by other weights or settings" in run(*embed, fails=True).stderr
    assert "made by other weights or settings" in train(1, *TAUGHT, output="beside", fails=True).stderr
    shutil.rmtree(tmp_path / "scorer")
    train(1, *TAUGHT, "teacher.weight=2", output="beside")


@pytest.mark.full
def test_what_is_no_cross_encoder_and_what_has_no_scores_are_refused(scorer, train, run, tmp_path):
    embed = ["stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *HERE, *TAUGHT]
    pairs = run(*embed, "data.text=[{path: text-pairs/drawn}]", fails=True).stderr
    assert "holds text-pairs, and teacher.loss 'margin_mse' compares a target with hard negatives" in pairs
    config = json.loads((tmp_path / "scorer/config.json").read_text())
    labels = {"id2label": {str(i): str(i) for i in range(3)}, "label2id": {str(i): i for i in range(3)}}
    (tmp_path / "scorer/config.json").write_text(json.dumps({**config, **labels}))
    assert "scorer" in (said := run(*embed, fails=True).stderr)
    assert "cross-encoder" in said
    (tmp_path / "scorer/config.json").write_text("{}")
    assert "cannot load" in run(*embed, fails=True).stderr
    none = train(1, *TRIPLETS, "teacher={loss: margin_mse}", fails=True).stderr
    assert "has no scores, and the recipe names no teacher.model" in none
