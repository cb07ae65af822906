"""The folder of copies: what is fetched ahead, what goes when it is full, what was spoiled in it."""

import errno
import gc
import hashlib
import multiprocessing
import os
import pickle
import resource
import signal
import time

import pytest
from data_prep.shards import Dataset, ShardError, ShardUnavailable, manifest, write_manifest
from stage_trainer.data import remote_data
from stage_trainer.errors import UserError

PER_SHARD = 2  # samples, as `data` writes them


def room_for(data, shards):
    """Gigabytes of so many shards, and of every sidecar."""
    entries = data.manifest["shards"]
    return (sum(s["bytes"] for s in entries[:shards]) + sum(s["index_bytes"] for s in entries)) / 1e9


def test_a_copy_of_the_wrong_size_is_fetched_again(data, server, opened, everything):
    everything(opened())
    (copy,) = (opened().directory).glob("00003.tar")
    copy.write_bytes(b"")
    assert everything(opened()) == everything(Dataset.open(data))
    assert server.requests["00003.tar"] == 2


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_a_copy_that_was_spoiled_on_the_disk_is_fetched_again_and_bad_data_is_not(data, server, opened, everything):
    everything(opened())
    there, here = opened(), Dataset.open(data)
    offset, _ = here.row(6).members["json"]
    flip(there.directory / "00003.tar", offset)
    assert there.read(6) == here.read(6)
    assert server.requests["00003.tar"] == 2

    manifest, index = data / "manifest.json", data / "00003.index.npy"  # the sidecar is at odds with the tar
    former = hashlib.sha256(index.read_bytes()).hexdigest()
    content = index.read_bytes().replace(bytes.fromhex(here.row(6).sha256), bytes(32))
    index.unlink()
    index.write_bytes(content)
    text = manifest.read_text().replace(former, hashlib.sha256(content).hexdigest())
    manifest.unlink()
    manifest.write_text(text)
    there = opened()
    for _ in range(2):
        with pytest.raises(ShardError, match="sample 's6' is damaged"):
            there.read(6)
    assert there.read(7) == here.read(7)
    assert server.requests["00003.tar"] == 3


def test_a_full_disk_is_one_message_and_leaves_nothing(server, opened, leftovers):
    there = opened()
    there.row(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # as a full disk: writing beyond fails with an errno
    try:
        with pytest.raises(UserError, match=r"remote.cache, .*, cannot be used \(.*\): free some space"):
            there.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers() == []
    assert there.read(0)


def test_a_full_disk_makes_room_of_what_nobody_reads(data, server, opened, monkeypatch, everything):
    everything(opened())
    there, fetch, calls = opened(), remote_data.fetch, []
    (there.directory / "00003.tar").unlink()

    def refuse_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fetch(*arguments)

    monkeypatch.setattr(remote_data, "fetch", refuse_once)
    assert there.read(6) == Dataset.open(data).read(6)
    assert [p.name for p in there.directory.glob("*.tar")] == ["00003.tar"]


def test_beyond_the_limit_the_oldest_goes_and_nothing_that_is_read(data, server, opened, tmp_path):
    mine = tmp_path / "cache/mine.tar"
    mine.parent.mkdir()
    mine.write_bytes(bytes(10_000_000))  # somebody's own file in that folder is nobody else's business
    here = Dataset.open(data)
    limit = room_for(opened(), 3)
    reader, other = opened(gigabytes=limit), opened(gigabytes=limit)

    def present():
        return [int(p.name[:5]) for p in sorted(reader.directory.glob("*.tar"))]

    for shard in (0, 1, 2):
        reader.read(shard * PER_SHARD)
        time.sleep(0.02)  # files know the time of their last use in such steps
    other.read(0)
    reader.expect([])
    reader.read(3 * PER_SHARD)
    assert present() == [0, 2, 3]  # 0 is the oldest, but it is being read
    other.expect([])
    reader.read(4 * PER_SHARD)
    reader.read(5 * PER_SHARD)
    assert present() == [3, 4, 5]
    assert reader.read(6) == here.read(6)
    reader.read(6 * PER_SHARD)  # it reads four: a sample that is needed comes before the limit
    assert present() == [3, 4, 5, 6]
    reader.directory.joinpath("00003.tar").unlink()
    assert reader.read(7) == here.read(7)  # an open file stays whole
    assert mine.stat().st_size == 10_000_000


def test_what_comes_next_is_fetched_before_it_is_asked_for_and_kept(server, opened, wait_for):
    one, other = opened(downloads=3), opened(downloads=3)
    server.faults = {f"{n:05d}.tar": ["slow", None] for n in range(10)}
    one.expect([7, 2, 5])
    other.expect([1, 8])  # one fetches ahead for all
    wait_for(lambda: len(list(one.directory.glob("*.tar"))) == 3)
    assert sorted(p.name for p in one.directory.glob("*.tar")) == ["00002.tar", "00005.tar", "00007.tar"]
    assert server.requests["00001.tar"] == 0
    assert one._cache.clear()  # takes the sidecars, which are read in whole, and no tar that will be read
    assert len(list(one.directory.glob("*.tar"))) == 3
    asked = server.requests["00007.tar"]
    one.read(7 * PER_SHARD)
    assert server.requests["00007.tar"] == asked == 1
    one.expect([5])
    wait_for(lambda: one._cache.clear() or len(list(one.directory.glob("*.tar"))) == 1)
    one = None
    wait_for(lambda: (other.expect([1]), other.expect([8]), server.requests["00008.tar"])[2])  # the next one leads


def test_fetching_ahead_goes_no_further_than_there_is_room(server, opened, wait_for):
    there = opened(gigabytes=room_for(opened(), 3), downloads=1)
    there.expect(list(range(10)))
    wait_for(lambda: not there._prefetcher._wanted)
    wait_for(lambda: len(list(there.directory.glob("*.tar"))) == 3)
    assert sorted(p.name for p in there.directory.glob("*.tar")) == [f"{n:05d}.tar" for n in range(3)]


def test_a_process_that_is_killed_in_a_download_leaves_it_to_the_next(data, server, opened, leftovers, wait_for):
    server.faults = {"00000.tar": ["hold", None]}
    there = opened()
    child = multiprocessing.get_context("fork").Process(target=there.read, args=(0,))
    child.start()
    wait_for(lambda: server.requests["00000.tar"])
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert leftovers()
    assert there.read(0) == Dataset.open(data).read(0)
    assert leftovers() == []


def test_the_table_of_many_shards_is_fetched_once_and_mapped_by_all(data, server, opened, everything, monkeypatch):
    here = Dataset.open(data)
    monkeypatch.setattr(manifest, "LISTED", 0)
    write_manifest(data, kind=here.kind, source=here.source, shards=here.manifest["shards"])
    there = opened()
    assert set(server.requests) == {"manifest.json", "shards.npy"}
    assert (
        everything(there) == everything(opened()) == everything(pickle.loads(pickle.dumps(there))) == everything(here)
    )
    assert there.bytes_of([0, 3]) == sum(here.shard(n).bytes + here.shard(n).index_bytes for n in (0, 3))
    assert server.requests["shards.npy"] == 1
    cache, table = there._cache, there.directory / "shards.npy"
    cache.clear()
    assert table.exists()  # what is mapped is in use
    del there
    gc.collect()
    assert cache.clear()
    assert not table.exists()  # and counts as a copy like any other
    server.faults = {"shards.npy": ["wrong bytes"]}
    with pytest.raises(ShardUnavailable, match=r"shards\.npy: .*not those of the manifest's sha256"):
        opened(retries=0)
