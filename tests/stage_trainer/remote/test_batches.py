"""Batches of a stage out of data under URLs, of many processes, with broken shards, behind commands."""

import dataclasses
import io
import json
import multiprocessing

import pytest
import torch
from data_prep.shards import Dataset
from PIL import Image
from stage_trainer.data.remote_data import RemotePlace, place
from stage_trainer.data.samples import replacement
from stage_trainer.errors import UserError
from stage_trainer.recipe import Recipe
from stage_trainer.recipe.read import flatten, load
from stage_trainer.run.loader import batches
from stage_trainer.tasks import make_task


class Numbers:
    """A tokenizer: a text is its length."""

    def __call__(self, texts, max_length):
        return [[0, len(words), 2] for words in texts]


@pytest.fixture
def recipe(tmp_path, recipes):
    def execute(corpus, *settings, batch=4) -> Recipe:
        overrides = [
            f"corpus={corpus}", "data={text: [{path: text-pairs/made}]}", f"batch={{text: {batch}}}", "steps=40",
            "resolution=[[0, 32]]",
            f"remote.cache={tmp_path}/cache", "remote.retries=1", *settings,
        ]  # fmt: skip
        return load(recipes / "drawn.yaml", overrides, 1).recipe

    return execute


def steps(recipe, rank=0, world=1, workers=0, stop=8):
    made = make_task(recipe, 1).make_batches(Numbers(), rank, world)
    return list(batches(made, 0, stop, workers))


def test_two_ranks_of_two_workers_download_each_shard_once_and_read_the_same(data, server, recipe, tmp_path):
    """Eight steps of four are more than an epoch."""
    server.faults = {f"{n:05d}.tar": ["slow", None] for n in range(10)}
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def rank(number):
        ids = [b.text_ids.tolist() for b, drawn in steps(recipe(server.url), number, 2, workers=2) if not drawn.corrupt]
        found.put((number, ids))

    ranks = [context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    there = dict(found.get() for _ in ranks)
    for process in ranks:
        process.join()
    here = {n: [b.text_ids.tolist() for b, _ in steps(recipe(tmp_path / "corpus"), n, 2)] for n in range(2)}
    assert there == here
    shards = {name: count for name, count in server.requests.items() if name != "manifest.json"}
    assert shards == {p.name: 1 for p in data.iterdir() if p.name != "manifest.json"}


def test_the_sampler_fetches_its_next_window_while_it_reads_this_one(data, server, recipe, wait_for):
    settings = "data={text: [{path: text-pairs/made}], lanes: 1}"
    made = make_task(recipe(server.url, settings, batch=2), 1).make_batches(Numbers(), 0, 1)
    made[0]
    wait_for(lambda: len(list(made.text_sources[0].directory.glob("*.tar"))) >= 8)
    order = made.text_sampler.orders[0].ahead(0, 4, 0, 1)
    assert {p.name for p in made.text_sources[0].directory.glob("*.tar")} == {f"{n:05d}.tar" for n in order}
    assert len(order) == 8


def machine(recipe, corpus, rank, world, cache):
    """Six batches of a rank with a cache of its own, as ids, and the bytes that it fetched by its own account."""
    made = make_task(recipe(corpus, f"remote.cache={cache}", batch=8), 1).make_batches(Numbers(), rank, world)
    found = [made[step] for step in range(6)]
    return [batch.text_ids.tolist() for batch, _ in found], sum(drawn.fetched for _, drawn in found)


def test_four_machines_fetch_a_quarter_each_and_two_of_them_later_only_what_they_lack(
    tmp_path, write_data, serve, recipe
):
    """Sixteen shards of which each is a lane, for more than an epoch."""
    directory = write_data(32)
    server = serve(tmp_path / "corpus")
    whole = sum(path.stat().st_size for path in directory.iterdir())
    alone, _ = machine(recipe, tmp_path / "corpus", 0, 1, tmp_path)
    for world, shares in ((4, [0.25] * 4), (2, [0.25, 0.5])):
        server.requests.clear()
        found = [machine(recipe, server.url, rank, world, tmp_path / f"cache{rank}") for rank in range(world)]
        assert [fetched for _, fetched in found] == pytest.approx([whole * share for share in shares], rel=0.1)
        assert sum(n for name, n in server.requests.items() if name.endswith(".tar")) == 16 * sum(shares)
        for step in range(6):
            assert sorted(i for ids, _ in found for i in ids[step]) == sorted(alone[step])


def test_the_samples_of_a_broken_shard_are_all_replaced_from_one_other(data):
    here = Dataset.open(data)
    for shard in range(10):
        of_whole = [replacement(here, index, 0, True) for index in here.samples_of(shard)]
        assert len({here.shard_of(index) for index in of_whole}) == 1
        of_one = {index: replacement(here, index, 0, False) for index in here.samples_of(shard)}
        assert all(index != other and here.shard_of(other) == shard for index, other in of_one.items())
        assert {here.shard_of(replacement(here, here.samples_of(shard)[0], n, False)) for n in range(16)} != {shard}


def test_a_broken_shard_becomes_entries_of_the_ledger(data, server, recipe):
    """The same ones whatever the number of workers."""
    server.faults = {"00003.tar": [404]}
    one, two = steps(recipe(server.url)), steps(recipe(server.url), workers=2)
    for (batch, drawn), (same, again) in zip(one, two, strict=True):
        assert torch.equal(batch.text_ids, same.text_ids)
        assert drawn.corrupt == again.corrupt
    entries = [entry for _, drawn in one for entry in drawn.corrupt]
    assert entries
    assert {entry.key for entry in entries} == {"s6", "s7"}
    assert all(entry.shard.endswith("00003.tar") and "404 Not Found" in entry.reason for entry in entries)
    assert server.requests["00003.tar"] == 2  # once each run


def test_a_source_of_broken_shards_alone_is_one_message(server, recipe):
    server.faults = {f"{n:05d}.tar": [404] for n in range(10)}
    with pytest.raises(UserError, match="16 samples in a row were of no use.*404 Not Found"):
        steps(recipe(server.url), workers=1)


def test_a_cache_too_small_for_a_step_is_refused_with_what_it_needs(server, recipe):
    with pytest.raises(UserError, match=r"remote.gigabytes is 0.0001, but a step .* need 0.0009"):
        steps(recipe(server.url, "remote.gigabytes=0.0001"))


def test_a_limit_has_to_hold_for_the_lanes_of_all_ranks_of_a_machine(server, recipe, monkeypatch):
    """A shard is some 80 kB; each of two ranks has five of the ten."""
    task = make_task(recipe(server.url, "remote.gigabytes=0.0006"), 1)
    task.make_batches(Numbers(), 1, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"remote.gigabytes is 0.0006, but .* lower data.lanes"):
        task.make_batches(Numbers(), 1, 2)


def test_a_path_may_be_a_url_and_a_corpus_behind_a_command(data, server, recipe, tmp_path):
    here = steps(recipe(tmp_path / "corpus"))
    sources = (
        (str(tmp_path / "nowhere"), [f"data={{text: [{{path: '{server.url}/train/text-pairs/made?signed=1'}}]}}"]),
        (f"file://{tmp_path}/corpus", []),
        (f"pipe:cat {tmp_path}/corpus/{{name}}", ["remote.allow_pipe=true"]),
        (server.url, [f"data={{text: [{{path: {data}}}]}}"]),
    )
    for number, (corpus, settings) in enumerate(sources):
        there = steps(recipe(corpus, *settings, f"remote.cache={tmp_path}/cache{number}"))
        assert all(torch.equal(a.text_ids, b.text_ids) for (a, _), (b, _) in zip(here, there, strict=True))


@pytest.mark.parametrize("setting", ["downloads=0", "retries=-1", "timeout=0", "gigabytes=0"])
def test_settings_that_cannot_be_meant_are_refused(recipe, setting):
    with pytest.raises(UserError, match=f"remote.{setting.partition('=')[0]} is .*; expected"):
        recipe("corpus", f"remote.{setting}")


def test_checkpoints_and_screens_see_addresses_without_credentials():
    tree = {"corpus": "https://me:pw@host/a?sig=1", "masked_lm": ("s3://b/c", "text-pairs/x"), "steps": 3}
    shown = {"corpus": "https://host/a", "masked_lm": ("s3://b/c", "text-pairs/x"), "steps": 3}
    assert flatten(tree) == shown


def test_a_command_is_run_only_if_the_recipe_allows_it(data, recipe, tmp_path):
    command = f"touch {tmp_path}/ran; cat {tmp_path}/corpus/{{name}}"
    with pytest.raises(UserError, match="remote.allow_pipe=true"):
        steps(recipe(f"pipe:{command}"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="without {name}"):
        steps(recipe("pipe:cat", "remote.allow_pipe=true"))
    allowed = recipe(f"pipe:{command}", "remote.allow_pipe=true")
    assert isinstance(place(allowed, "train", "x"), RemotePlace)
    assert steps(allowed)
    assert (tmp_path / "ran").exists()


def test_other_peoples_tars_with_their_sidecars_beside_them_serve(tmp_path, recipe, serve):
    import tarfile

    from data_prep.cli import main

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for shard in range(2):
        with tarfile.open(theirs / f"{shard:05d}.tar", "w") as tar:
            for number in range(4):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (60 * shard, 60 * number, 0)).save(picture, "jpeg")
                members = {"jpg": picture.getvalue(), "txt": b"a colour", "json": json.dumps({"key": 1}).encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    main(["index", str(theirs), "--name", "theirs", "--out", str(tmp_path / "corpus/train")])
    (index,) = (tmp_path / "corpus/train").rglob("manifest.json")
    path = index.parent.relative_to(tmp_path / "corpus/train")
    server = serve(tmp_path / "corpus")
    settings = [f"data={{image_text: [{{path: {path}}}]}}", "batch={image_text: 4}"]
    here, there = (steps(recipe(corpus, *settings)) for corpus in (tmp_path / "corpus", server.url))
    assert len(here) == 8
    assert all(torch.equal(a.images, b.images) for (a, _), (b, _) in zip(here, there, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_fetched_before_processes_were_started_is_counted_once(data, server, recipe, workers):
    """Here a sample is read before, as the first one of triplets is."""
    made = make_task(recipe(server.url), 1).make_batches(Numbers(), 0, 1)
    made.text_sources[0].read(0)
    found = sum(drawn.fetched for _, drawn in batches(made, 0, 8, workers))
    files = [path for path in data.iterdir() if path.name not in ("manifest.json", "summary.json")]
    assert found == sum(path.stat().st_size for path in files)


def by_ranges(made):
    return made.text_sources[0].by_ranges


def test_a_source_of_which_little_is_drawn_is_fetched_sample_by_sample(tmp_path, write_data, serve, recipe, capsys):
    """Sixteen lanes of a shard of 80 kB each, of which three batches draw less than a quarter."""
    write_data(32)
    server = serve(tmp_path / "corpus")
    few, many = recipe(server.url, "steps=3", "warmup_steps=0", batch=2), recipe(server.url, batch=2)
    many_made, made = (make_task(each, 1).make_batches(Numbers(), 0, 1) for each in (many, few))
    assert (by_ranges(many_made), by_ranges(made)) == (False, True)
    assert "draws 6 samples of shards that hold 32" in capsys.readouterr().out
    sent = server.sent
    found = [made[step] for step in range(3)]
    here = steps(recipe(tmp_path / "corpus", batch=2), stop=3)
    assert [batch.text_ids.tolist() for batch, _ in found] == [batch.text_ids.tolist() for batch, _ in here]
    fetched = sum(drawn.fetched for _, drawn in found)
    assert 6 * 40_000 < fetched <= server.sent - sent < 6 * 60_000
    assert not list(made.text_sources[0].directory.glob("*.tar"))


def test_ranges_are_forced_or_forbidden_and_a_server_without_them_sends_whole_shards(data, server, recipe, caplog):
    whole = steps(recipe(server.url, "remote.ranges=never"))
    always = make_task(recipe(server.url, "remote.ranges=always", f"remote.cache={data}/other"), 1)
    found = [always.make_batches(Numbers(), 0, 1)[step] for step in range(8)]
    assert [b.text_ids.tolist() for b, _ in found] == [b.text_ids.tolist() for b, _ in whole]
    server.ranges = False
    again = make_task(recipe(server.url, "remote.ranges=always", f"remote.cache={data}/third"), 1)
    made = again.make_batches(Numbers(), 0, 1)
    assert [made[step][0].text_ids.tolist() for step in range(8)] == [b.text_ids.tolist() for b, _ in whole]
    assert not by_ranges(made)
    assert "sends no ranges" in caplog.text


def test_a_sample_that_is_damaged_on_the_way_is_fetched_with_its_shard(data, server, recipe, monkeypatch):
    """Its hash tells; a copy of the shard has the manifest's checksum."""
    from stage_trainer.data import remote_data

    right = remote_data.fetch_span
    monkeypatch.setattr(
        remote_data,
        "fetch_span",
        lambda *a: dataclasses.replace(found := right(*a), content=b"?" + found.content[1:]),
    )
    made = make_task(recipe(server.url, "remote.ranges=always"), 1).make_batches(Numbers(), 0, 1)
    assert not made[0][1].corrupt
    assert list(made.text_sources[0].directory.glob("*.tar"))
