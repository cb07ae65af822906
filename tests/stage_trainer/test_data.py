import io
import json
import struct
import zlib

import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.data.batches import _replacement
from stage_trainer.data.drawn import Corrupt
from stage_trainer.data.samples import REPLACEMENTS, SampleCache
from stage_trainer.data.sections import enumerate_within
from stage_trainer.errors import UserError
from stage_trainer.evaluation.retrieval import Pool
from stage_trainer.recipe.read import load
from stage_trainer.run.ledger import Ledger
from stage_trainer.run.loader import batches
from stage_trainer.tasks import make_task


def text(words):
    return [{"text": words, "language": "en"}]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    """Writes train/KIND/made of a corpus, from the members of each sample."""

    def execute(kind, samples, samples_per_shard=1000):
        directory = tmp_path / "train" / kind / "made"
        with DatasetWriter(directory, kind=kind, source="made", samples_per_shard=samples_per_shard) as writer:
            for number, members in enumerate(samples):
                packed = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in members.items()}
                writer.write(f"s{number}", packed, languages=["en"], tokens=None)
        return directory

    return execute


@pytest.fixture
def stage(tmp_path, recipes):
    """The batches of a stage over what `write` wrote, texts being tokenised to their lengths."""

    def execute(task, kind, batch=4, source="{path: %s/made}", rank=0, world=1, more=()):
        other = "text" if task == "image_text" else "image_text"
        overrides = [
            f"corpus={tmp_path}", f"data={{{task}: [{source % kind}]}}", f"batch={{{task}: {batch}, {other}: 0}}",
            *more,
        ]  # fmt: skip
        recipe = load(recipes / "drawn.yaml", overrides, 1).recipe

        def tokenizer(texts, max_length):
            return [[0, len(words), 2] for words in texts]

        return make_task(recipe, 1).make_batches(tokenizer, rank, world)

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


def graded(score):
    return {"json": {"query": text("q"), "target": text("t"), "score": score}}


@pytest.mark.parametrize("workers", [0, 1])
def test_graded_pairs_bring_their_scores_and_one_without_is_replaced(write, stage, workers):
    """Also on a rank that has none of a batch's pairs, and would not know otherwise which loss it takes part in."""
    write("text-pairs", [graded(4.5), graded(1), graded(0), {"json": {"query": text("q"), "target": text("t")}}])
    source = "{path: %s/made, graded: true}"
    batch, drawn = next(batches(stage("text", "text-pairs", source=source), 0, 1, workers))
    assert batch.scores.dtype == torch.float64
    assert {4.5, 1.0, 0.0} <= set(batch.scores.tolist())
    assert len(batch.scores) == batch.pairs == 4
    assert "sample s3 has no score" in drawn.corrupt[0].reason
    ranks = [stage("text", "text-pairs", source=source, rank=rank, world=8)[0][0] for rank in (3, 4)]
    assert [len(rank.scores) for rank in ranks] == [1, 0]
    assert stage("text", "text-pairs")[0][0].scores is None
    write("text-triplets", [triplet(1)] * 4)
    with pytest.raises(UserError, match="is 'graded' and holds text-triplets"):
        stage("text", "text-triplets", source=source)


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
        ("image-short", {}, "sample s0: its .json has no captions"),
        ("image-short", {"captions": []}, "sample s0: its .json has no captions"),
        ("image-short", b"{", "sample s0: its .json is not JSON"),
        ("image-short", [1], "sample s0: its .json has no captions"),
        ("text-pairs", {"query": text("q")}, "sample s0: its .json has no target"),
        ("text-triplets", {"query": text("q"), "target": text("t")}, "sample s0: its .json has no negatives"),
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


def noise(seed: int, kind: str = "png") -> bytes:
    pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, kind)
    return buffer.getvalue()


def by_item(ids, *columns):
    """{item: what belongs to it} of a batch's rows."""
    return {item: row for item, *row in zip(ids.tolist(), *columns, strict=True)}


def test_an_image_comes_otherwise_in_each_epoch(write, stage):
    """Cut, caption and dropout follow from sample and epoch together."""
    captions = [{"text": "x" * n, "language": "en"} for n in range(1, 31)]
    write("image-short", [{"png": noise(n), "json": {"captions": captions, "item": f"i{n}"}} for n in range(4)])
    data = stage("image_text", "image-short")
    epochs = []
    for epoch in range(3):
        batch, _ = data[epoch]  # a batch is all there is, so each is an epoch
        chosen = [int(text[1]) for text in batch.texts.ids.split(batch.texts.lengths)]
        epochs.append(by_item(batch.image_ids, batch.images, batch.image_seeds.tolist(), chosen, batch.text_seeds))
        assert len(epochs[-1]) == 4
    for item in epochs[0]:
        images, seeds, chosen, text_seeds = zip(*(epoch[item] for epoch in epochs), strict=True)
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[1], images[2])
        assert len(set(seeds)) == len(set(map(int, text_seeds))) == 3
        assert len(set(chosen)) > 1


def test_a_text_pair_comes_otherwise_in_each_epoch(write, stage):
    """Which of its texts, and their dropout, follow from sample and epoch together."""

    def side(first):
        return [{"text": "x" * n, "language": "en"} for n in range(first, first + 15)]

    hard = [side(60), side(80)]
    write("text-triplets", [{"json": {"query": side(1), "target": side(30), "negatives": hard}} for _ in range(4)])
    data = stage("text", "text-triplets")
    epochs = []
    for epoch in range(3):
        batch, _ = data[epoch]
        texts = [int(text[1]) for text in batch.texts.ids.split(batch.texts.lengths)]
        seeds = batch.text_seeds.tolist()
        parts = (texts[:4], texts[4:8], texts[8::2], texts[9::2], seeds[:4], seeds[4:8], seeds[8::2], seeds[9::2])
        epochs.append(by_item(batch.text_ids, *parts))
        assert len(set(seeds)) == len(seeds), "no two texts of a step lose the same"
    for item in epochs[0]:
        columns = [set(column) for column in zip(*(epoch[item] for epoch in epochs), strict=True)]
        assert all(len(texts) > 1 for texts in columns[:4])
        assert all(len(seeds) == 3 for seeds in columns[4:])
    # Chosen each for itself, not all by one draw.
    queries, targets, first, second = zip(*(epoch[i][:4] for epoch in epochs for i in epoch), strict=True)
    assert any(q - 1 != t - 30 for q, t in zip(queries, targets, strict=True))
    assert any(a - 60 != b - 80 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("negatives", [1, 3])
def test_a_texts_dropout_is_its_own_whichever_rank_it_falls_to(write, stage, negatives):
    write("text-triplets", [triplet(negatives)] * 6)
    per_pair = []
    for world in (1, 2, 3):
        found = {}
        for rank in range(world):
            batch, _ = stage("text", "text-triplets", 6, rank=rank, world=world)[0]
            queries, targets, hard = batch.text_seeds.split([batch.pairs, batch.pairs, batch.pairs * negatives])
            hard = hard.view(batch.pairs, negatives).tolist()
            rows = zip(queries.tolist(), targets.tolist(), hard, strict=True)
            found |= {item: (q, t, *h) for item, (q, t, h) in zip(batch.text_ids.tolist(), rows, strict=True)}
        per_pair.append(found)
    assert per_pair[0] == per_pair[1] == per_pair[2]
    seeds = [seed for row in per_pair[0].values() for seed in row]
    assert len(set(seeds)) == len(seeds) == 6 * (2 + negatives)
    assert list(enumerate_within([5, 5, 5, 7, 7, 5])) == [(0, 5), (1, 5), (2, 5), (0, 7), (1, 7), (0, 5)]


class Shards:
    """What `_replacement` asks of a data set."""

    kind, source = "image-short", "made"

    def __init__(self, sizes):
        self.shard_sizes = sizes
        self.first = [sum(sizes[:n]) for n in range(len(sizes) + 1)]

    def shard_of(self, index):
        return next(n for n in range(len(self.shard_sizes)) if index < self.first[n + 1])

    def samples_of(self, shard):
        return range(self.first[shard], self.first[shard + 1])


@pytest.mark.parametrize("sizes", [[1, 1], [2], [1, 2], [3, 1, 2], [7], [1, 1, 1, 1], [5, 4, 1], [2, 2, 2]])
def test_a_replacement_is_never_the_bad_sample_itself(sizes):
    data, seen = Shards(sizes), set()
    for index in range(sum(sizes)):
        home = data.shard_of(index)
        for attempt in range(REPLACEMENTS):
            found = _replacement(data, index, attempt, False)
            assert found != index
            assert 0 <= found < sum(sizes)
            if attempt < 2 and sizes[home] > 1:
                assert data.shard_of(found) == home, "one that is at hand"
                seen.add((index, found))
            elif len(sizes) > 1:
                assert data.shard_of(found) != home
            gone = _replacement(data, index, attempt, True)
            assert (data.shard_of(gone) != home) == (len(sizes) > 1), "a shard that is gone has none to give"
        targets = {data.shard_of(_replacement(data, i, 0, True)) for i in data.samples_of(home)}
        assert len(targets) == 1, "one other shard is fetched for all of its samples"
    if sizes == [7]:
        assert len({(found - index) % 7 for index, found in seen}) > 3, "any other may be it"


def test_one_sample_alone_is_replaced_by_itself_until_it_is_given_up():
    assert _replacement(Shards([1]), 0, 0, False) == 0


def test_a_bad_sample_costs_one_entry_where_shards_hold_one_each(write, stage, tmp_path):
    write("text-triplets", [triplet(2)] * 3 + [triplet(1)], samples_per_shard=1)
    _, drawn = next(batches(stage("text", "text-triplets"), 0, 1, 0))
    assert [entry.key for entry in drawn.corrupt] == ["s3"]


def test_decoded_samples_are_kept_until_the_room_is_full_and_what_came_first_stays(write, monkeypatch):
    """A pixel counts a byte a channel, texts four times their bytes."""
    directory = write("image-short", [{"png": noise(n), "json": {"captions": text("a" * n)}} for n in range(1, 6)])
    data = Dataset.open(directory)
    members = [data.read(n) for n in range(5)]
    costs = [4 * sum(map(len, m.values())) + 24 * 24 * 3 for m in members]
    cache = SampleCache(1)
    assert cache.left == 2**20
    cache.left = costs[0] + costs[1] + costs[2] - 1
    first = [cache.sample(data, n) for n in (0, 1, 2)]
    assert cache.left == costs[2] - 1, "the third has no place"
    reads = []
    monkeypatch.setattr(data, "read", lambda n: reads.append(n) or members[n])
    again = [cache.sample(data, n) for n in (0, 1, 2)]
    assert reads == [2]
    for (pixels, texts), (pixels_again, texts_again) in zip(first, again, strict=True):
        assert torch.equal(pixels, pixels_again)
        assert texts == texts_again
    cache.left = costs[3]
    cache.sample(data, 3)
    assert cache.left == 0, "what just fits has a place"


def test_pixels_do_not_depend_on_what_was_read_before_nor_on_the_cache(write, stage):
    """A cached image is the whole one, for any crop, resolution and epoch."""
    captions = [{"text": "a", "language": "en"}]
    images = [{"jpg": noise(n, "jpeg"), "json": {"captions": captions, "item": f"i{n}"}} for n in range(4)]
    write("image-short", images)
    plain, cached = (stage("image_text", "image-short", more=(f"cache_megabytes={size}",)) for size in (0, 8))
    for step in (2, 0, 1, 2):
        assert torch.equal(plain[step][0].images, cached[step][0].images)
    assert len(cached.cache.kept) == 4
    assert not plain.cache.kept


def test_texts_alone_are_kept_too(write):
    data = Dataset.open(write("text-pairs", [{"json": {"query": text("q"), "target": text("t")}}]))
    cache = SampleCache(2)
    pixels, _ = cache.sample(data, 0)
    assert pixels is None
    assert cache.left == 2 * 2**20 - 4 * len(data.read(0)["json"])
    nothing = SampleCache(0)
    nothing.sample(data, 0)
    assert (nothing.left, nothing.kept) == (0, {})


def test_a_sample_is_what_its_file_holds(write):
    """Pixels channel first, and the item that the sample names, or its place."""
    named = {"captions": text("a"), "item": "the item"}
    directory = write(
        "image-short", [{"png": noise(1), "json": named}, {"png": noise(2), "json": {"captions": text("b")}}]
    )
    data = Dataset.open(directory)
    pixels, content = SampleCache(1).sample(data, 0)
    expected = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert torch.equal(pixels, expected.permute(2, 0, 1))
    assert content["item"] == "the item"
    assert SampleCache(1).sample(data, 1)[1]["item"] == "made/00000.tar/s1"


def test_tokens_are_counted_with_their_squares(write, stage):
    write("text-pairs", [{"json": {"query": text("q"), "target": text("t" * 5)}}] * 4)
    batch, drawn = stage("text", "text-pairs")[0]
    lengths = batch.texts.lengths
    assert sorted(lengths) == [3] * 8
    assert (drawn.tokens, drawn.squared_tokens) == (24, 8 * 9)
    assert drawn.texts == {"text-pairs/made/en": 8}


def in_languages(*lengths):
    return [{"text": "x" * n, "language": language} for n, language in lengths]


@pytest.mark.parametrize(
    ("language", "targets", "chosen"),
    [
        (None, [(1, "en"), (5, "de"), (6, "fr")], {5, 6}),  # not the query's own words
        (None, [(1, "en"), (1, "de")], {1}),  # unless there are no others
        ("fr", [(1, "fr"), (5, "de"), (6, "fr"), (7, "fr")], {6, 7}),
        ("it", [(1, "en"), (5, "de"), (6, "fr")], {5, 6}),  # none in the language that the recipe wants
    ],
)
def test_a_target_is_in_other_words_and_in_the_language_that_the_recipe_wants(write, stage, language, targets, chosen):
    content = {"query": in_languages((1, "en")), "target": in_languages(*targets)}
    write("text-pairs", [{"json": content}] * 20)
    source = "{path: %s/made" + (f", target_language: {language}" if language else "") + "}"
    batch, _ = stage("text", "text-pairs", 20, source)[0]
    found = [int(text[1]) for text in batch.texts.ids.split(batch.texts.lengths)]
    assert set(found[:20]) == {1}
    assert set(found[20:]) == chosen


def test_the_fingerprint_names_every_data_set(write, stage):
    directory = write("text-pairs", [{"json": {"query": text("q"), "target": text("t")}}] * 4)
    assert stage("text", "text-pairs").fingerprint == {"text-pairs/made": Dataset.open(directory).fingerprint}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_larger_than_max_pixels_is_refused_by_its_header_replaced_and_named(write, stage):
    """The header says 40,000 by 4,000; there are no pixels to decode, so nothing but the header can have been read."""
    header = png()[:16] + struct.pack(">II", 40_000, 4_000) + png()[24:29]
    huge = header + struct.pack(">I", zlib.crc32(header[12:])) + png()[33:]
    write("image-short", [{"png": png(), "txt": b"dot"}] * 5 + [{"png": huge, "txt": b"dot"}])
    batch, drawn = next(batches(stage("image_text", "image-short", batch=6), 0, 1, 0))
    (entry,) = drawn.corrupt
    assert entry.key == "s5"
    assert "is 40000x4000 pixels, more than the 50,000,000 allowed" in entry.reason
    assert len(batch.images) == 6
    _, drawn = next(batches(stage("image_text", "image-short", batch=6, more=["max_pixels=170000000"]), 0, 1, 0))
    assert "cannot be decoded" in drawn.corrupt[0].reason, "with a higher limit it is read"
