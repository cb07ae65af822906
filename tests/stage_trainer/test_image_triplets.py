"""Captions with hard-negative images, from shards to batches: whose they are, what becomes of bad ones, what has no
place for them."""

import contextlib
import io
import json

import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.data import batches as of_stage
from stage_trainer.data.samples import SampleCache
from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import find
from stage_trainer.evaluation.retrieval import Pool
from stage_trainer.recipe.read import load
from stage_trainer.run.loader import batches
from stage_trainer.tasks import make_task
from vision_tower import ImageError

SIZE = 16
PLAIN = ("augmentation={views: 1}", f"resolution=[[0, {SIZE}]]")
"""Images as they are stored."""


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (shade, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def triplet(number: int, negatives: int = 2) -> dict:
    """Its caption has `number` letters; its image is of the shade 10 · number, its negatives of the next ones."""
    captions = [{"text": "x" * (number + 1), "language": "en", "origin": "human", "role": "query"}]
    further = {f"negative-{k}.png": png(10 * number + 1 + k) for k in range(negatives)}
    return {"png": png(10 * number), **further, "json": {"captions": captions, "item": f"i{number}"}}


@pytest.fixture
def write(tmp_path):
    def execute(samples, kind="image-triplets", split="train", name="made"):
        directory = tmp_path / split / kind / name
        with DatasetWriter(directory, kind=kind, source=name, samples_per_shard=3) as writer:
            for number, members in enumerate(samples):
                packed = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in members.items()}
                writer.write(f"s{number}", packed, languages=["en"], tokens=None)
        return directory

    return execute


@pytest.fixture
def stage(tmp_path, recipes):
    def execute(*more, batch=4, rank=0, world=1, sources=("image-triplets/made",)):
        paths = ", ".join(f"{{path: '{source}'}}" for source in sources)
        overrides = [f"corpus={tmp_path}", f"data={{image_text: [{paths}]}}", f"batch={{image_text: {batch}, text: 0}}"]
        recipe = load(recipes / "drawn.yaml", [*overrides, *more], 1).recipe

        def tokenizer(texts, max_length):
            return [[0, len(words), 2] for words in texts]

        return make_task(recipe, 1).make_batches(tokenizer, rank, world)

    return execute


def shown(batch):
    """{letters of a caption: (shade of its image, shades of its negatives, seeds of these images)}."""
    letters = [int(ids[1]) for ids in batch.texts.ids.split(batch.texts.lengths)]
    rows = batch.images[:, 0, 0, 0].view(1 + batch.image_negatives, len(letters)).T.tolist()
    seeds = batch.image_seeds.view(1 + batch.image_negatives, len(letters)).T.tolist()
    return {n: (own, hard, of) for n, (own, *hard), of in zip(letters, rows, seeds, strict=True)}


@pytest.mark.parametrize("negatives", [1, 2, 5])
def test_a_caption_has_its_own_image_and_its_own_negatives_whichever_rank_it_falls_to(write, stage, negatives):
    write([triplet(n, negatives) for n in range(7)])
    found = []
    for world in (1, 2, 3):
        rows = {}
        for rank in range(world):
            batch, _ = stage(*PLAIN, batch=7, rank=rank, world=world)[0]
            assert batch.images.shape == ((1 + negatives) * len(batch.image_ids), 3, SIZE, SIZE)
            rows |= shown(batch)
        found.append(rows)
    assert found[0] == found[1] == found[2]
    assert {n: row[:2] for n, row in found[0].items()} == {
        n + 1: (10 * n, [10 * n + 1 + k for k in range(negatives)]) for n in range(7)
    }
    seeds = [seed for *_, of in found[0].values() for seed in of]
    assert len(set(seeds)) == len(seeds) == 7 * (1 + negatives), "each image loses other patches"


def test_a_batch_is_the_same_in_however_many_pieces_and_processes(write, stage, monkeypatch):
    write([triplet(n) for n in range(9)])
    data = stage("resolution=[[0, 16]]", batch=9)
    assert data.pieces(0) == 1
    whole = [data[step][0] for step in range(2)]
    monkeypatch.setattr(of_stage, "PIECE", 2 * 3 * 3 * SIZE**2 + 1)  # of two captions, each with three images
    assert data.pieces(0) == 5
    assert data.piece(0, 0).pixels.numel() <= data.piece_bytes(0)
    items = batches(data, 0, 2, workers=2)
    with contextlib.closing(items):
        others = [item[0] for item in items]
    for found in ([data[step][0] for step in range(2)], others):
        for one, other in zip(whole, found, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.image_seeds, other.image_seeds)


def test_each_draw_cuts_each_negative_otherwise(write, stage):
    """Where an image's views are not fixed."""
    noise = [torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(n)) for n in range(2)]

    def encoded(n):
        buffer = io.BytesIO()
        Image.fromarray(noise[n].to(torch.uint8).numpy()).save(buffer, "png")
        return buffer.getvalue()

    both = {"png": encoded(0), "negative-0.png": encoded(1), "negative-1.png": encoded(1)}
    write([{**both, "json": triplet(n)["json"]} for n in range(4)])
    data = stage("resolution=[[0, 16]]")
    first, second = (data[epoch][0].images.view(3, 4, -1) for epoch in (0, 1))
    rows = [row for epoch in (first, second) for row in epoch[1:].flatten(0, 1)]
    assert len({row.numpy().tobytes() for row in rows}) == len(rows) == 16


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["fewer", "more", "broken"])
def test_a_sample_with_another_number_of_negatives_or_a_bad_one_is_replaced_and_named(write, stage, workers, what):
    bad = triplet(3, {"fewer": 1, "more": 3, "broken": 2}[what])
    if what == "broken":
        bad["negative-1.png"] = b"no image"
    write([*map(triplet, range(3)), bad])
    (batch, drawn), *_ = batches(stage(*PLAIN), 0, 1, workers)
    assert batch.image_negatives == 2
    (entry,) = drawn.corrupt
    assert entry.key == "s3"
    assert ("cannot be decoded" if what == "broken" else "the first triplet of the stage has 2") in entry.reason
    letters = [int(ids[1]) for ids in batch.texts.ids.split(batch.texts.lengths)]
    assert sorted({*letters}) == [1, 2, 3]


def test_negatives_that_nothing_reads_are_not_decoded(write, tmp_path):
    """As where a teacher's loss alone reads the images: a broken one costs no sample."""
    write([triplet(0) | {"negative-0.png": b"broken"}])
    data = Dataset.open(tmp_path / "train/image-triplets/made")
    pixels, content = SampleCache(0, negatives=False).sample(data, 0)
    assert pixels.shape == (3, SIZE, SIZE)
    assert "negative_images" not in content
    with pytest.raises(ImageError):
        SampleCache(0).sample(data, 0)


def test_the_number_is_that_of_the_first_sample_that_can_be_read(write, stage):
    broken = triplet(0, 3) | {"negative-2.png": b"no image"}
    write([broken, *map(triplet, range(1, 5))])
    assert stage(*PLAIN).image_negatives == 2


def test_what_has_no_place_for_them_is_refused_by_name(write, stage):
    write(list(map(triplet, range(6))))
    write([{"png": png(n), "txt": b"a dot"} for n in range(6)], kind="image-short")
    other = ("image-triplets/made", "image-short/made")
    for sources in (other, other[::-1]):
        with pytest.raises(UserError, match="data.image_text mixes image-triplets/made and image-short/made"):
            stage(*PLAIN, sources=sources)
    frozen = ("trainable={image: none, text: all}", "embedding_cache=kept", "patch_dropout=[[0, 0]]")
    with pytest.raises(UserError, match="'embedding_cache' keeps the embeddings of captioned images, and has no place"):
        stage(*PLAIN, *frozen)
    assert stage(*PLAIN, *frozen[:1], *frozen[2:]).image_negatives == 2
    with pytest.raises(UserError, match=r"{00000..00001}.tar: its samples have hard-negative images.*name the folder"):
        stage(sources=("image-triplets/made/{00000..00001}.tar",))[0]


def test_a_unified_loss_has_no_place_for_them(write, tmp_path, recipes):
    write(list(map(triplet, range(6))))
    text = [{"text": "a", "language": "en"}]
    write([{"json": {"query": text, "target": text}}] * 6, kind="text-pairs")
    data = "data={image_text: [{path: image-triplets/made}], text: [{path: text-pairs/made}]}"
    settings = [f"corpus={tmp_path}", data, "batch={image_text: 4, text: 4}", "loss={kind: unified, dims: [64]}"]
    recipe = load(recipes / "drawn.yaml", [*settings, "model.temperature=0.07"], 1).recipe
    with pytest.raises(UserError, match="a unified loss has no place for the hard-negative images of .*image-triplets"):
        make_task(recipe, 1).make_batches(None, 0, 1)


def test_what_a_json_calls_negatives_makes_no_hard_negatives_of_other_kinds(write, stage):
    samples = [triplet(n, 0) for n in range(4)]
    for sample in samples:
        sample["json"] |= {"negatives": [1, 2], "negative_images": ["x"]}
    write(samples, kind="image-short")
    data = stage(*PLAIN, sources=("image-short/made",))
    batch, drawn = data[0]
    assert (data.image_negatives, batch.image_negatives, len(batch.images), drawn.corrupt) == (0, 0, 4, [])


def test_a_pool_measures_the_captions_and_their_own_images_alone(write, tmp_path):
    directory = write(list(map(triplet, range(3))), split="test")
    pool = Pool.open(directory)
    assert pool.images == [png(0), png(10), png(20)]
    assert pool.documents
    assert pool.texts == {"en": [(0, "x"), (1, "xx"), (2, "xxx")]}
    assert [each.kind for each in find(tmp_path).sets] == ["image-triplets"]


def test_decoded_negatives_count_as_what_is_kept(write):
    data, cache = Dataset.open(write([triplet(0)])), SampleCache(1)
    cache.sample(data, 0)
    assert len(cache.kept) == 1
    assert 2**20 - cache.left >= 3 * 3 * SIZE**2
