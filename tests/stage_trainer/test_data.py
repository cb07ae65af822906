import io
import json

import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.data.batches import Corrupt, StageBatches
from stage_trainer.data.ledger import Ledger
from stage_trainer.data.loader import batches
from stage_trainer.data.samples import SampleCache
from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import Pool
from stage_trainer.recipe.read import load


def text(words):
    return [{"text": words, "language": "en"}]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    """Writes train/KIND/made of a corpus, from the members of each sample."""

    def execute(kind, samples):
        directory = tmp_path / "train" / kind / "made"
        with DatasetWriter(directory, kind=kind, source="made") as writer:
            for number, members in enumerate(samples):
                packed = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in members.items()}
                writer.write(f"s{number}", packed, languages=["en"], tokens=None)
        return directory

    return execute


@pytest.fixture
def stage(tmp_path, recipes):
    """The batches of a stage over what `write` wrote, texts being tokenised to their lengths."""

    def execute(task, kind, batch=4):
        other = "text" if task == "image_text" else "image_text"
        overrides = [
            f"corpus={tmp_path}", f"data={{{task}: [{{path: {kind}/made}}]}}", f"batch={{{task}: {batch}, {other}: 0}}",
        ]  # fmt: skip
        recipe = load(recipes / "drawn.yaml", overrides, 1).recipe

        def tokenizer(texts, max_length):
            return [[0, len(words), 2] for words in texts]

        return StageBatches(recipe, recipe.stage(1), 1, tokenizer, 0, 1)

    return execute


def triplet(negatives):
    return {"json": {"query": text("q"), "target": text("t"), "negatives": [text(f"n{i}") for i in range(negatives)]}}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_replaced_and_named_whoever_read_it(write, stage, workers):
    """By the same one each time, so that a run goes on as it began."""
    write("text-triplets", [triplet(2)] * 3 + [triplet(1)])
    found = [next(batches(stage("text", "text-triplets"), 0, 1, workers)) for _ in range(2)]
    for batch, drawn in found:
        assert (batch.pairs, batch.negatives) == (4, 2)
        (entry,) = drawn.corrupt
        assert entry.key == "s3"
        assert entry.shard.endswith("text-triplets/made/00000.tar")
        assert "has 1 negatives; the first triplet" in entry.reason
    assert torch.equal(found[0][0].text_ids, found[1][0].text_ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_bad_samples_alone_is_one_message(write, stage, workers):
    write("image-short", [{"png": b"not an image", "txt": b"dot"}] * 6)
    with pytest.raises(UserError, match="16 samples in a row were of no use.*cannot be decoded") as caught:
        next(batches(stage("image_text", "image-short"), 0, 1, workers))
    assert "Traceback" not in str(caught.value)


def test_the_ledger_lists_what_was_replaced_and_ends_a_run_with_too_many(tmp_path):
    ledger = Ledger(tmp_path / "corrupt.jsonl", limit=0.1, active=True)
    entry = Corrupt("00000.tar", "s3", "cannot be decoded")
    ledger.enter([entry] * 10, step=0, drawn=20)  # a few stop no run
    ledger.enter([entry], step=1, drawn=200)
    with pytest.raises(UserError, match=r"22 of 210 samples .* more than max_corrupt=0.1 .*cannot be decoded"):
        ledger.enter([entry] * 11, step=2, drawn=210)
    lines = [json.loads(line) for line in (tmp_path / "corrupt.jsonl").read_text().splitlines()]
    assert len(lines) == 22
    assert lines[10] == {"step": 1, "shard": "00000.tar", "key": "s3", "reason": "cannot be decoded"}


def test_any_number_of_negatives_serves(write, stage):
    write("text-triplets", [triplet(2)] * 4)
    batch, _ = next(batches(stage("text", "text-triplets"), 0, 1, 0))
    assert (batch.pairs, batch.negatives, len(batch.texts.cu_seqlens) - 1) == (4, 2, 16)


def test_a_txt_caption_serves_for_training_and_as_a_pool(write, stage):
    directory = write("image-short", [{"png": png(), "txt": f"dot {i}".encode()} for i in range(6)])
    batch, drawn = next(batches(stage("image_text", "image-short"), 0, 1, 0))
    assert batch.images.shape == (4, 3, 32, 32)
    assert set(drawn.texts) == {"image-short/made/und"}
    assert len(set(batch.image_ids.tolist())) == 4
    pool = Pool.open(directory)
    assert pool.texts == {"und": [(i, f"dot {i}") for i in range(6)]}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("image-short", {}, "sample s0 has no captions"),
        ("image-short", {"captions": []}, "sample s0 has no captions"),
        ("image-short", b"{", "sample s0: its .json is not JSON"),
        ("image-short", [1], "sample s0 has no captions"),
        ("text-pairs", {"query": text("q")}, "sample s0 has no target"),
        ("text-triplets", {"query": text("q"), "target": text("t")}, "sample s0 has no negatives"),
    ],
)
def test_texts_that_a_kind_needs_and_a_sample_lacks_are_named(write, kind, content, message):
    image = {"png": png()} if kind.startswith("image") else {}
    directory = write(kind, [{**image, "json": content}])
    with pytest.raises(ValueError, match=message):
        SampleCache(0).sample(Dataset.open(directory), 0)
    if kind.startswith("image"):
        with pytest.raises(UserError, match=message):
            Pool.open(directory)


def test_a_data_set_of_texts_is_no_pool(write):
    directory = write("text-pairs", [{"json": {"query": text("q"), "target": text("t")}}])
    with pytest.raises(UserError, match="sample s0 has no image and captions"):
        Pool.open(directory)
