"""Shards that a recipe names one by one, without sidecars: what is read, in which order, and what befalls it."""

import collections
import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from stage_trainer.data import ranges
from stage_trainer.data.lanes import UncountedOrder
from stage_trainer.data.sampler import TaskSampler
from stage_trainer.data.stateless_rng import key
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.run.loader import batches
from stage_trainer.tasks import make_task

SHARDS, SAMPLES = 6, 10


def picture(number=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def write_shard(path, first=0, count=SAMPLES, **more):
    """As a user of webdataset writes it."""
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(first, first + count):
            tar.write({"__key__": f"s{number:03d}", "png": picture(number), "txt": "x" * (1 + number), **more})


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "corpus/train/plain"
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        write_shard(folder / f"{number:05d}.tar", number * SAMPLES)
    return folder


@pytest.fixture
def made(tmp_path, recipes, shards):
    """The batches of a rank; a text's tokens are as many as its letters."""

    def tokenizer(texts, max_length):
        return [[0, len(words), 2] for words in texts]

    def execute(*settings, rank=0, world=1, batch=8, path="plain/{00000..00005}.tar", source="", lanes=4):
        overrides = [
            f"corpus={tmp_path}/corpus",
            f'data={{image_text: [{{path: "{path}"{source}}}], lanes: {lanes}}}',
            f"batch={{image_text: {batch}, text: 0}}", "resolution=[[0, 32]]", "steps=60",
            f"remote.cache={tmp_path}/cache", "remote.retries=1", *settings,
        ]  # fmt: skip
        recipe = load(recipes / "drawn.yaml", overrides, 1).recipe
        return make_task(recipe, 1).make_batches(tokenizer, rank, world)

    return execute


def numbers(batch):
    """Of the samples of a batch, by their captions' lengths."""
    ids = batch.texts.ids.view(-1, 3)[:, 1]
    return [int(length) - 1 for length in ids]


def read(made, start, stop, workers=0):
    return [numbers(batch) for batch, _ in batches(made, start, stop, workers)]


def entries(made, steps=8):
    return [entry for step in range(steps) for entry in made[step][1].corrupt]


def test_the_order_of_uncounted_lanes_is_dealt_out_as_that_of_counted_ones():
    """Each lane's samples come one after another, equally many of each lane; ranks' parts are the whole."""
    for lanes, batch in ((1, 5), (4, 8), (6, 7), (64, 96)):
        sampler = TaskSampler([UncountedOrder(lanes)], [1.0], batch, one_source=False)
        whole = np.concatenate([sampler.part(n).index for n in range(12)])
        assert sorted(whole.tolist()) == list(range(12 * batch)) or batch % lanes
        by_lane = collections.Counter((whole % lanes).tolist())
        assert max(by_lane.values()) - min(by_lane.values()) <= 1
        for lane in by_lane:
            assert sorted((whole[whole % lanes == lane] // lanes).tolist()) == list(range(by_lane[lane]))
        for world in (2, 3, 5):
            for n in range(12):
                parts = np.concatenate([sampler.part(n, rank, world).index for rank in range(world)])
                assert sorted(parts.tolist()) == sorted(sampler.part(n).index.tolist())


def test_an_epoch_of_a_lane_shows_each_of_its_samples_once_and_the_next_one_in_another_order(made):
    found = [n for batch in read(made(lanes=1), 0, 15) for n in batch]
    one, two = found[:60], found[60:]
    assert sorted(one) == sorted(two) == list(range(60))
    assert one != two != sorted(one)


def test_samples_are_shuffled_within_blocks_and_shards_as_a_whole(made):
    """With blocks of one sample a shard comes in its own order."""
    found = [n for batch in read(made(source=", shuffle_buffer: 1", lanes=1), 0, 7) for n in batch][:50]
    assert all(b == a + 1 for a, b in pairwise(found) if b % SAMPLES)
    shuffled = [n for batch in read(made(source=", shuffle_buffer: 5", lanes=1), 0, 7) for n in batch]
    assert {n // SAMPLES for n in shuffled[:5]} == {n // SAMPLES for n in found[:5]}
    assert shuffled[:5] != found[:5]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_ranks_or_workers(made, world):
    alone = read(made(), 0, 20)
    assert read(made("workers=2"), 0, 20, workers=2) == alone
    ranks = [read(made(rank=rank, world=world), 0, 20) for rank in range(world)]
    for step in range(20):
        assert sorted(n for rank in ranks for n in rank[step]) == sorted(alone[step])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_goes_on_where_another_one_stopped_and_opens_no_shard_before_that(made, world, monkeypatch):
    straight = read(made(), 0, 30)
    ranks = [made(rank=rank, world=2) for rank in range(2)]
    for rank in ranks:
        read(rank, 0, 17)
    state = json.loads(json.dumps(dict(sorted(item for rank in ranks for item in rank.state_dict().items()))))
    assert len(state) == 4
    opened = []
    more = [made(rank=rank, world=world) for rank in range(world)]
    for rank in more:
        rank.load_state_dict(state)
        for lane in rank.image_sources[0]._lanes:
            members = lane._members
            monkeypatch.setattr(lane, "_members", lambda shard, m=members: opened.append(shard.name) or m(shard))
    first = [read(rank, 17, 18) for rank in more]
    assert sorted(n for rank in first for n in rank[0]) == sorted(straight[17])
    assert len(opened) <= 2 * (4 + world - 1)  # of each lane the shard of its block and perhaps the next; some twice
    rest = [read(rank, 18, 30) for rank in more]
    for step in range(18, 30):
        assert sorted(n for rank in rest for n in rank[step - 18]) == sorted(straight[step])


def test_a_source_of_plain_shards_stands_beside_an_indexed_one(made, tmp_path):
    from data_prep.shards import DatasetWriter

    directory = tmp_path / "corpus/train/image-short/made"
    with DatasetWriter(directory, kind="image-short", source="made") as writer:
        for number in range(100, 116):
            caption = {"text": "x" * (1 + number), "language": "en", "origin": "human", "role": "name"}
            members = {"png": picture(), "json": json.dumps({"item": str(number), "captions": [caption]}).encode()}
            writer.write(f"s{number}", members, languages=["en"], tokens=None)
    both = made(source=", rate: 3}, {path: image-short/made")
    found = [n for batch in read(both, 0, 8) for n in batch]
    assert sum(n >= 100 for n in found) == 16
    assert list(both.fingerprint) == ["image-short/plain", "image-short/made"]


@pytest.mark.parametrize("ranged", [True, False])
def test_a_server_is_asked_for_what_is_read_and_what_comes_is_counted(
    made, serve, tmp_path, shards, ranged, monkeypatch
):
    monkeypatch.setattr(ranges, "SPAN", 4096)
    server = serve(tmp_path / "corpus")
    server.ranges = ranged
    small = ", shuffle_buffer: 2"
    found = [made(f"corpus={server.url}", rank=rank, world=2, source=small)[0] for rank in range(2)]
    assert [n for batch, _ in found for n in numbers(batch)] == read(made(source=small), 0, 1)[0]
    whole = sum(path.stat().st_size for path in shards.iterdir())
    fetched = sum(drawn.fetched for _, drawn in found)
    assert fetched <= server.sent  # what comes next is under way
    assert fetched < whole / 2 if ranged else fetched >= whole / 2
    assert not [path for path in tmp_path.glob("cache/*") if path.is_file()]


def test_a_machine_fetches_the_shards_of_its_lanes_alone(made, serve, tmp_path):
    server = serve(tmp_path / "corpus")
    asked = []
    for rank in range(2):
        server.requests.clear()
        read(made(f"corpus={server.url}", rank=rank, world=2), 0, 20)
        asked.append(set(server.requests))
    assert len(asked[0]) == len(asked[1]) == 3
    assert not asked[0] & asked[1]


def test_other_file_systems_are_read_by_ranges(made, tmp_path, shards, monkeypatch):
    import fsspec

    monkeypatch.setattr(ranges, "SPAN", 4096)
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert read(made(path="memory://bucket/{00000..00005}.tar"), 0, 15) == read(made(), 0, 15)


def test_a_cut_connection_is_tried_again(made, serve, tmp_path, waits):
    server = serve(tmp_path / "corpus")
    server.faults = {f"{n:05d}.tar": ["cut", 503, None] for n in range(SHARDS)}
    assert read(made(f"corpus={server.url}", "remote.retries=2"), 0, 7) == read(made(), 0, 7)
    assert waits


@pytest.mark.parametrize(("fault", "said"), [(403, "403 Forbidden"), (500, "500 Internal"), ("grows", "file changed")])
def test_what_a_server_refuses_ends_the_run_by_name_and_what_it_lacks_is_passed_over(
    made, serve, tmp_path, waits, fault, said, monkeypatch
):
    """Else what follows would depend on the server's health; a shard that is gone is gone for all."""
    monkeypatch.setattr(ranges, "SPAN", 4096)
    server = serve(tmp_path / "corpus")
    server.faults = {"00003.tar": [404]}
    there = made(f"corpus={server.url}")
    assert {n // SAMPLES for batch in read(there, 0, 20) for n in batch} == {0, 1, 2, 4, 5}
    server.faults = {"00003.tar": [fault]}
    with pytest.raises(UserError, match=f"00003.tar: .*{said}.*same command goes on"):
        read(made(f"corpus={server.url}"), 0, 20)


def test_damaged_shards_and_samples_are_entered_once_and_replaced(made, shards):
    whole = (shards / "00001.tar").read_bytes()
    with tarfile.open(shards / "00001.tar") as tar:
        border = tar.getmembers()[10].offset
    (shards / "00001.tar").write_bytes(whole[:border])  # between two samples
    (shards / "00002.tar").write_bytes(b"")
    write_shard(shards / "00003.tar", 30, 3, png=b"no picture")
    write_shard(shards / "00004.tar", 40, 2, txt=" ")

    def of(world):
        ranks = [made(rank=rank, world=world, lanes=1) for rank in range(world)]
        found = [made[step] for made in ranks for step in range(4)]
        assert {n for batch, _ in found for n in numbers(batch)} <= {*range(20), *range(50, 60)}
        return collections.Counter(entry.reason for _, drawn in found for entry in drawn.corrupt)

    said = of(1)
    assert of(3) == said
    assert any("00001.tar: it ends without the empty blocks" in reason for reason in said)
    assert any("00002.tar: empty file" in reason for reason in said)
    assert any("s030" in reason for reason in said)
    assert any("no caption: its .txt is empty" in reason for reason in said)


def test_members_that_do_not_stand_together_are_told_so(made, shards):
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for kind, content in (("png", picture()), ("txt", b"words")):
            for number in range(4):
                info = tarfile.TarInfo(f"s{number}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert any("have to stand together" in entry.reason for entry in entries(made()))


def test_a_lane_without_a_sample_ends_the_run_by_name(made, shards):
    for path in shards.iterdir():
        path.write_bytes(b"\0" * 10240)
    with pytest.raises(UserError, match=r"no sample could be read of the \d shards"):
        made()[0]


def test_corrupt_samples_alone_end_the_run_by_name(made, shards):
    for path in shards.iterdir():
        write_shard(path, png=b"no picture")
    with pytest.raises(UserError, match="16 samples in a row were of no use"):
        made()[0]


def test_captions_of_any_field_and_of_our_own_format(made, shards):
    for path in shards.iterdir():
        write_shard(path, json=json.dumps({"meta": {"alt": ["y" * 7]}, "caption": 3}).encode(), txt="z" * 9)
    assert set(read(made(source=", caption_key: meta.alt"), 0, 1)[0]) == {6}
    assert set(read(made(), 0, 1)[0]) == {8}
    ours = [{"text": "y" * n, "language": "en", "origin": "human", "role": "name"} for n in (3, 4)]
    for path in shards.iterdir():
        write_shard(path, json=json.dumps({"captions": ours}).encode(), txt="z" * 9)
    assert {n for batch in read(made(), 0, 4) for n in batch} == {2, 3}


def test_images_are_told_apart_by_shard_and_key(made, shards):
    batch, _ = made(batch=60, lanes=6)[0]
    assert len(set(batch.image_ids.tolist())) == 60
    assert key(f"{shards}/00000.tar/s003") in batch.image_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "path", "source", "said"),
    [
        ((), "plain/{00000..00009}.tar", "", r"4 of the 10 shards of .* are not there, the first is .*00006.tar"),
        ((), "plain/00000.tar::plain/00000.tar", "", "more than once"),
        ((), "pipe:cat x.tar", "", "pipe:, which cannot go on in the middle"),
        (("augmentation={views: 1}",), "plain/{00000..00005}.tar", "", "augmentation.views is 1"),
        (
            ("embedding_cache=kept", "trainable.text=none"),
            "plain/{00000..00005}.tar",
            "",
            "keeps embeddings by the number",
        ),
        ((), "plain/{00000..00005}.tar", ", shuffle_buffer: 0", "shuffle_buffer 0; expected at least 1"),
        ((), "image-short/drawn", ", caption_key: alt", "'caption_key', which is for shards"),
        (("data.text=[{path: a.tar}]",), "plain/00000.tar", "", "only data.image_text takes shards without a manifest"),
    ],
)
def test_what_plain_shards_cannot_do_is_refused_by_name(made, settings, path, source, said):
    with pytest.raises(UserError, match=said):
        made(*settings, path=path, source=source)


def test_another_list_of_shards_is_another_fingerprint(made):
    one, two = made(), made(path="plain/{00000..00004}.tar")
    assert one.fingerprint != two.fingerprint


def test_images_are_decoded_as_those_of_data_sets(made, shards):
    batch, _ = made(batch=4, lanes=1)[0]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.images[:, 0].flatten(1).float().mean(1).round().int().tolist() == numbers(batch)


def test_an_empty_shard_of_a_server_is_passed_over(made, serve, tmp_path, shards):
    (shards / "00002.tar").write_bytes(b"")
    server = serve(tmp_path / "corpus")
    server.faults = {"00002.tar": [416]}
    there = made(f"corpus={server.url}", lanes=2)
    assert {n // SAMPLES for batch in read(there, 0, 20) for n in batch} == {0, 1, 3, 4, 5}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("plain/{00000..00005}.tar::nosuch://bucket/x.tar", "nosuch://bucket/x.tar cannot be opened here"),
        ("plain/{00000..00005.tar", "is no list of shards"),
        ("plain/${NO_SUCH}.tar", "is no list of shards"),
    ],
)
def test_shards_that_nothing_here_opens_end_the_run_by_name(made, path, said):
    with pytest.raises(UserError, match=said):
        read(made(path=path), 0, 20)


def test_two_sources_of_one_name_are_refused(made, tmp_path, shards):
    other = tmp_path / "corpus/train/more/plain"
    other.mkdir(parents=True)
    for path in shards.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="2 sources of shards in folders called 'plain'"):
        made(source='}, {path: "more/plain/{00000..00005}.tar"')


def test_too_many_open_files_are_no_fault_of_a_shard(made, monkeypatch):
    import errno
    import os

    there = made()

    def no_more(place):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), place)

    monkeypatch.setattr("builtins.open", lambda place, mode="r", **_: no_more(place))
    with pytest.raises(OSError, match="Too many open files"):
        there[0]
