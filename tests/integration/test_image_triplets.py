"""Hard-negative images from a table to training: ranks, ZeRO, the ring and frozen texts give one curve."""

import json

import pytest
from data_prep.shards import Dataset

SMALL = (
    "steps=4", "warmup_steps=0", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]",
    "batch={image_text: 8, text: 8}", "optimizer.name=adamw", "model.text.dropout=0",
)  # fmt: skip
TAGS = ("loss/image_text", "loss/text", "temperature/image_text")


@pytest.fixture
def triplets(run, drawn_corpus, tmp_path) -> str:
    """Pictures of the drawn corpus with two others each, as `data-prep import images` writes them; how to draw them."""
    pictures = Dataset.open(drawn_corpus / "train/image-short/drawn")
    (tmp_path / "pages").mkdir()
    rows = []
    for number in range(24):
        members = pictures.read(number)
        (tmp_path / f"pages/{number}.png").write_bytes(members["png"])
        captions = [text["text"] for text in json.loads(members["json"])["captions"] if text["language"] == "en"]
        others = [f"{(number + step) % 24}.png" for step in (1, 2, 3)]
        rows.append({"query": captions, "image": f"{number}.png", "negatives": others})
    (tmp_path / "pages/pages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--caption-column", "query", "--language", "en", "--negatives", 2, "--name", "mine", "--out", "mine"]
    run("data-prep", "import", "images", "pages", *options)
    return f"data.image_text=[{{path: {tmp_path}/mine/image-triplets/mine}}]"


def curve(scalars, output, tags=TAGS):
    return {tag: list(scalars(f"{output}/stage1", tag).values()) for tag in tags}


def assert_equal(found, expected):
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-4), tag


def test_two_ranks_and_chunks_under_zero_have_the_curve_of_one_process(train, run, scalars, triplets):
    one = train(1, *SMALL, triplets, output="one")
    assert "replaced" not in one.stdout
    expected = curve(scalars, "one")
    assert len(expected["loss/image_text"]) == 4
    chunks = "gradient_cache={images: 5, tokens: 60}"
    train(1, *SMALL, triplets, chunks, "deepspeed={zero_optimization: {stage: 2}}", output="two", ranks=2)
    assert_equal(curve(scalars, "two"), expected)


@pytest.mark.full
def test_ranks_of_a_ring_zero_3_and_texts_from_the_disk_have_that_curve_too(train, scalars, triplets):
    train(1, *SMALL, triplets, output="one")
    whole = "deepspeed={zero_optimization: {stage: 3}}"
    train(1, *SMALL, triplets, "loss.exchange=ring", whole, output="ring", ranks=2)
    assert_equal(curve(scalars, "ring"), curve(scalars, "one"))
    frozen = (*SMALL, triplets, "trainable={text: none}")
    train(1, *frozen, output="without")
    out = train(1, *frozen, "embedding_cache=kept", output="with").stdout
    assert out.count("the frozen text tower runs once") == 2
    assert_equal(curve(scalars, "with"), curve(scalars, "without"))


@pytest.mark.full
def test_texts_beside_them_may_have_a_teacher(train, run, scalars, triplets):
    train(1, *SMALL, triplets, output="one")
    run("stage-trainer", "export", "one/stage1", "teacher")
    taught = (*SMALL, triplets, "teacher={model: teacher, folder: said}")
    here = ("corpus={corpus}", "model.tokenizer={corpus}/tokenizer.model")
    run("stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *here, *taught)
    train(1, *taught, output="taught")
    train(1, *taught, "gradient_cache={images: 5, tokens: 60}", output="ranks", ranks=2)
    expected = curve(scalars, "taught", (*TAGS, "loss/teacher"))
    assert_equal(curve(scalars, "ranks", (*TAGS, "loss/teacher")), expected)
