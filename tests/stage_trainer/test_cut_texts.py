"""Texts that `max_tokens` cuts: counted where it happens, over all ranks, said once, and foretold by the plan."""

import json
from collections import Counter

import pytest
from data_prep.shards import DatasetWriter
from stage_trainer.data.sections import shortened
from stage_trainer.plan.lengths import text_lengths
from stage_trainer.recipe.read import load
from stage_trainer.run.text_counts import TextCounts
from stage_trainer.tasks import make_task

LONG = "six words are in this text"
SHORT = "two words"


def texts(*words):
    return [{"text": text, "language": "en"} for text in words]


def words_as_tokens(given, max_length=None):
    return [shortened([0, *map(len, text.split()), 2], max_length or 10**6) for text in given]


@pytest.fixture
def corpus(tmp_path, png):
    """Eight images of which three have long captions, and eight triplets of which some texts are long."""
    with DatasetWriter(tmp_path / "train/image-short/made", kind="image-short", source="made") as writer:
        for number in range(8):
            captions = texts(LONG if number < 3 else SHORT)
            content = {"png": png, "json": json.dumps({"captions": captions}).encode()}
            writer.write(f"i{number}", content, languages=["en"], tokens=len(captions[0]["text"].split()) + 2)
    with DatasetWriter(tmp_path / "train/text-triplets/made", kind="text-triplets", source="made") as writer:
        for number in range(8):
            content = {
                "query": texts(SHORT),
                "target": texts(LONG),
                "negatives": [texts(f"{LONG} too"), texts(f"{SHORT} {number}")],
            }
            writer.write(f"t{number}", {"json": json.dumps(content).encode()}, languages=["en"], tokens=9)
    return tmp_path


@pytest.fixture
def recipe(corpus, recipes):
    def read(*settings):
        data = "data={image_text: [{path: image-short/made}], text: [{path: text-triplets/made}]}"
        given = [f"corpus={corpus}", data, "batch={image_text: 8, text: 8}", "max_tokens=5", *settings]
        return load(recipes / "drawn.yaml", given, 1).recipe

    return read


@pytest.mark.parametrize("world", [1, 2])
def test_cut_texts_of_all_ranks_are_counted_by_source(recipe, world):
    read = recipe()
    counts = Counter()
    for rank in range(world):
        batches = make_task(read, 1).make_batches(words_as_tokens, rank, world)
        batch, drawn = batches[0]
        sources = list(batches.fingerprint)
        counts.update(dict(enumerate(drawn.of_sources(sources))))
        assert max(batch.texts.lengths) == 5
    assert sources == ["image-short/made", "text-triplets/made"]
    # Three captions; of each triplet the target and one of two negatives.
    assert [counts[i] for i in range(4)] == [8, 8 * 4, 3, 8 * 2]


def test_a_text_of_just_max_tokens_is_not_cut(recipe):
    read = recipe("max_tokens=8")
    batches = make_task(read, 1).make_batches(words_as_tokens, 0, 1)
    assert batches[0][1].of_sources(["image-short/made", "text-triplets/made"])[2:] == [0, 8]


def test_a_source_is_spoken_of_once_in_a_stage_when_enough_of_it_was_seen():
    counted = TextCounts({}, {})
    counted.count(["a/b", "c/d"], [100, 300, 31, 0])
    assert counted.news(8, last=False) == []
    counted.count(["a/b", "c/d"], [200, 300, 62, 0])
    (line,) = counted.news(8, last=False)
    assert "a/b: 93 of its 300 texts so far (31.0%) are longer than max_tokens 8" in line
    assert counted.news(8, last=True) == []
    assert TextCounts(counted.drawn, counted.cut).news(8, last=True) == [], "nor by the process that goes on"
    assert counted.shares(cut=True)["texts_cut/a/b"] == pytest.approx(0.31)
    assert counted.shares(cut=True)["texts_cut/c/d"] == 0
    assert not any(name.startswith("texts_cut") for name in counted.shares(cut=False))


def test_a_short_run_hears_of_cut_texts_at_its_end():
    counted = TextCounts({}, {})
    counted.count(["a/b"], [36, 9])
    assert "9 of its 36 texts" in counted.news(8, last=True)[0]


def test_the_plan_counts_what_steps_take(recipe, monkeypatch):
    monkeypatch.setattr("stage_trainer.plan.lengths._tokenizer", lambda recipe: words_as_tokens)
    read = recipe()
    found = text_lengths(read, read.stage(1), None)
    assert found.captions == pytest.approx((3 * 5 + 5 * 4) / 8)
    assert found.texts == pytest.approx((4 + 5 + 5 + 5) / 4)
    first, second = found.cut
    assert first.startswith("image-short/made: 37.5% of the texts are longer than max_tokens 5")
    assert "the texts of 8 samples counted" in first
    assert second.startswith("text-triplets/made: 50.0%")
    assert text_lengths(read, read.stage(1), 3.0).cut == found.cut, "told lengths do not hide it"


def test_without_the_tokenizer_the_sidecars_tell_and_without_data_nobody_does(recipe):
    read = recipe("model.tokenizer=nowhere.model")
    found = text_lengths(read, read.stage(1), None)
    assert "image-short/made: 37.5%" in found.cut[0]
    assert "by the sidecars" in found.cut[0]
    read = recipe("corpus=nowhere")
    (line,) = text_lengths(read, read.stage(1), None).cut
    assert "not known" in line
    assert line.endswith(": 2")
