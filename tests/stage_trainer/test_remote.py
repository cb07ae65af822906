"""Data under URLs, against a server on loopback that misbehaves on purpose and counts what it is asked for."""

import base64
import collections
import contextlib
import errno
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from data_prep.shards import Dataset, DatasetWriter, ShardError, ShardUnavailable
from PIL import Image
from stage_trainer import remote, remote_data
from stage_trainer.data import StageBatches, _replacement, batches
from stage_trainer.errors import UserError
from stage_trainer.recipe import Recipe, Remote
from stage_trainer.recipe_file import flatten, load
from stage_trainer.remote import Address
from stage_trainer.remote_data import RemotePlace, place
from stage_trainer.sampler import SourceOrder

SAMPLES, PER_SHARD, BYTES = 20, 2, 40_000  # ten shards of two samples


@pytest.fixture
def data(tmp_path) -> Path:
    """corpus/train/text-pairs/made, ten shards of some 80 kB."""
    directory = tmp_path / "corpus/train/text-pairs/made"
    with DatasetWriter(directory, kind="text-pairs", source="made", samples_per_shard=PER_SHARD) as writer:
        for number in range(SAMPLES):
            sides = {side: [{"text": f"{side} {number}", "language": "en"}] for side in ("query", "target")}
            content = json.dumps({**sides, "padding": "x" * BYTES}).encode()
            writer.write(f"s{number}", {"json": content}, languages=["en"], tokens=None)
    return directory


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        faults: what befalls the next requests for a file name, in order; the last one befalls all that follow.
        requests: {file name: number of requests}.
        headers: of each request, with its path.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list] = {}
        self.requests: collections.Counter[str] = collections.Counter()
        self.headers: list[tuple[str, dict]] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # the client that hangs up is part of the game


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        self.server.requests[name] += 1
        self.server.headers.append((self.path, dict(self.headers)))
        queue = self.server.faults.get(name, [])
        fault = queue.pop(0) if len(queue) > 1 else queue[0] if queue else None
        file = self.server.folder / path.lstrip("/")
        if fault is None and not file.exists():
            fault = 404
        if isinstance(fault, tuple):  # status and further headers
            return self._answer(fault[0], b"", fault[1])
        if isinstance(fault, int):
            return self._answer(fault, b"", {})
        if fault == "hang up":
            return self.connection.close()
        if fault == "silence":
            self.server.released.wait(5)
            return self.connection.close()
        body = file.read_bytes()
        if fault == "wrong bytes":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if fault == "too short":
            body = body[:-50]
        if fault == "too long":
            body += b"x" * 1000
        if fault == "slow":
            time.sleep(0.3)
        self._answer(200, body, {}, cut=fault == "cut", hold=fault == "hold")

    def _answer(self, status, body, headers, cut=False, hold=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if cut or hold:
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if hold:
            self.wfile.flush()
            self.server.released.wait(20)
        if cut or hold:
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(data, tmp_path):
    with contextlib.closing(Server(tmp_path / "corpus")) as found:
        found.close = lambda: (found.released.set(), found.shutdown(), found.server_close())
        yield found


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been slept between attempts."""
    slept = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    return slept


@pytest.fixture
def opened(server, tmp_path):
    """Opens the data set at the server as a run does."""

    def execute(base=None, **settings):
        options = {"cache": str(tmp_path / "cache"), "timeout": 5, "retries": 4, **settings}
        return RemotePlace(Address(base or server.url, "train/text-pairs/made"), Remote(**options)).open()

    return execute


def everything(data):
    return [data.read(index) for index in range(len(data))]


def room_for(data, shards):
    """Gigabytes of so many shards, and of every sidecar."""
    entries = data.manifest["shards"]
    return (sum(s["bytes"] for s in entries[:shards]) + sum(s["index_bytes"] for s in entries)) / 1e9


def leftovers(tmp_path):
    return [p.name for p in (tmp_path / "cache").rglob("*") if p.name.endswith((".part", ".lock"))]


def test_what_is_read_from_a_url_is_what_lies_in_the_folder(data, server, opened, tmp_path):
    here, there = Dataset.open(data), opened()
    assert (there.fingerprint, there.shard_sizes, there.kind) == (here.fingerprint, here.shard_sizes, here.kind)
    assert server.requests == {"manifest.json": 1}
    assert everything(there) == everything(here)
    assert [there.row(i) for i in range(SAMPLES)] == [here.row(i) for i in range(SAMPLES)]
    assert set(server.requests) == {p.name for p in data.iterdir()}
    assert set(server.requests.values()) == {1}
    assert leftovers(tmp_path) == []
    assert everything(pickle.loads(pickle.dumps(there))) == everything(opened()) == everything(here)
    assert sum(server.requests.values()) == len(server.requests) + 1  # another look at the manifest, and no shard


@pytest.mark.parametrize(
    ("fault", "least_wait"),
    [
        (500, 0.5), (503, 0.5), ((503, {"Retry-After": "7"}), 7), ((429, {"Retry-After": "3"}), 3),
        ((429, {"Retry-After": "100000"}), 60), ((429, {"Retry-After": "nonsense"}), 0.5),
        ("cut", 0.5), ("hang up", 0.5), ("wrong bytes", 0.5), ("too short", 0.5), ("too long", 0.5), ("silence", 0.5),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again(data, server, opened, waits, tmp_path, fault, least_wait):
    server.faults = {
        "00003.tar": [fault, None],
        "00004.index.jsonl": [fault, fault, None],
        "manifest.json": [503, None],
    }
    assert everything(opened(timeout=0.2)) == everything(Dataset.open(data))
    assert (server.requests["00003.tar"], server.requests["00004.index.jsonl"]) == (2, 3)
    assert len(waits) == 4
    assert min(waits[1:]) >= least_wait
    assert max(waits) <= remote.LONGEST_WAIT
    assert leftovers(tmp_path) == []


def test_a_date_in_retry_after_is_understood(monkeypatch):
    monkeypatch.setattr(remote.time, "time", lambda: 1445412480.0)  # RFC 9110's own example of a date
    assert remote._retry_after("Wed, 21 Oct 2015 07:28:30 GMT") == 30
    assert remote._retry_after("Wed, 21 Oct 2015 07:27:30 GMT") == 0


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (404, "404 Not Found", 1), (403, "403 Forbidden: the credentials are missing, wrong or out of date", 1),
        (500, "500 Internal Server Error", 5), ("cut", "bytes came|the connection was cut", 5),
        ("wrong bytes", "not those of the manifest's sha256", 3), ("too short", "bytes came, the manifest says", 5),
        ("too long", "more than the [0-9]+ bytes", 3), ("silence", "no answer for 0.2 s", 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["00003.tar", "00003.index.jsonl"])
def test_a_shard_that_stays_broken_is_named_once_and_costs_the_others_nothing(
    data, server, opened, waits, name, fault, message, requests
):
    server.faults = {name: [fault]}
    there, here = opened(timeout=0.2), Dataset.open(data)
    for reader in (there, there, pickle.loads(pickle.dumps(there))):  # another process of the run knows, too
        with pytest.raises(ShardUnavailable, match=rf"^{server.url}/train/text-pairs/made/{name}: .*({message})"):
            reader.read(6)
    assert there.name(6) == ("00003.tar", "s6" if name.endswith("tar") else "#0")
    assert there.read(5) == here.read(5)
    assert server.requests[name] == requests
    server.faults = {}
    assert opened().read(6) == here.read(6)  # mended: the next run tries again


@pytest.mark.parametrize("name", ["00000.tar", "00000.index.jsonl"])
def test_a_server_that_is_gone_ends_the_run_and_costs_no_samples(server, opened, waits, name):
    there = opened()
    server.faults = {name: [503] for name in ("manifest.json", name)}
    with pytest.raises(UserError, match=rf"{name}: 503 .* manifest.json beside it cannot be had either \(503 .*\)"):
        there.read(0)
    server.faults = {}
    assert there.read(0)


def test_a_data_set_that_was_replaced_under_a_run_is_said_to_be(data, server, opened, waits):
    there = opened()
    (data / "manifest.json").write_text((data / "manifest.json").read_text() + "\n")
    (data / "00000.tar").unlink()
    with pytest.raises(UserError, match="the data set was replaced"):
        there.read(0)


def test_no_server_no_manifest_and_a_manifest_that_is_none_are_one_message(data, server, opened, waits):
    with pytest.raises(UserError, match=f"{server.url}/nowhere/train/text-pairs/made/manifest.json: 404"):
        opened(f"{server.url}/nowhere")
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/.*manifest.json: .*refused"):
        opened("http://127.0.0.1:1")
    (data / "manifest.json").write_text("<html>please log in</html>")
    with pytest.raises(ShardError, match="not a manifest of trilith-shards/1"):
        opened()


def test_credentials_are_used_and_never_shown(data, server, opened, waits, caplog):
    base = server.url.replace("http://", "http://us%40er:pass%3Aword@") + "?sig=s3cret"
    there = opened(base)
    server.faults = {"00003.tar": [500], "00004.tar": [403]}
    said = [caplog]
    for index in (6, 8):
        with pytest.raises(ShardUnavailable) as caught:
            there.read(index)
        said.append(caught.value)
    assert there.read(0)
    secret = base64.b64encode(b"us@er:pass:word").decode()
    assert {headers["Authorization"] for _, headers in server.headers} == {f"Basic {secret}"}
    assert all(path.endswith("?sig=s3cret") for path, _ in server.headers)
    said = caplog.text + "".join(map(str, said[1:])) + str(there.directory)
    assert "trying again" in caplog.text
    assert not any(word in said for word in ("us%40er", "pass%3Aword", "s3cret", secret))


def test_a_redirection_is_followed_and_takes_no_password_along(data, server, opened, tmp_path):
    with contextlib.closing(Server(tmp_path / "corpus")) as other:
        other.close = lambda: (other.shutdown(), other.server_close())
        target = f"{other.url}/train/text-pairs/made/00000.tar"
        server.faults = {"00000.tar": [(302, {"Location": target})]}
        there = opened(server.url.replace("http://", "http://user:password@"))
        assert there.read(0) == Dataset.open(data).read(0)
        assert all("Authorization" in headers for _, headers in server.headers)
        assert [("Authorization" in headers) for _, headers in other.headers] == [False]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a?X-Sig=1 failed", "https://host/a failed"),
        ("hf://datasets/me/name@main/x", "hf://datasets/me/name@main/x"),
        ("'s3://key:secret@bucket/x?versionId=1'", "'s3://bucket/x'"),
        ("no address, a@b?c", "no address, a@b?c"),
    ],
)
def test_addresses_in_others_messages_lose_their_credentials(text, shown):
    assert remote.without_credentials(text) == shown
    assert remote.without_credentials('bucket "me:pw@b"', "s3://me:pw@b/c") == 'bucket "b"'


def test_a_copy_of_the_wrong_size_is_fetched_again(data, server, opened):
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


def test_a_copy_that_was_spoiled_on_the_disk_is_fetched_again_and_bad_data_is_not(data, server, opened):
    everything(opened())
    there, here = opened(), Dataset.open(data)
    offset, _ = here.row(6).members["json"]
    flip(there.directory / "00003.tar", offset)
    assert there.read(6) == here.read(6)
    assert server.requests["00003.tar"] == 2

    manifest, index = data / "manifest.json", data / "00003.index.jsonl"  # the sidecar is at odds with the tar
    former = hashlib.sha256(index.read_bytes()).hexdigest()
    content = index.read_text().replace(here.row(6).sha256, "0" * 64)
    index.unlink()
    index.write_text(content)
    text = manifest.read_text().replace(former, hashlib.sha256(content.encode()).hexdigest())
    manifest.unlink()
    manifest.write_text(text)
    there = opened()
    for _ in range(2):
        with pytest.raises(ShardError, match="sample 's6' is damaged"):
            there.read(6)
    assert there.read(7) == here.read(7)
    assert server.requests["00003.tar"] == 3


def test_a_full_disk_is_one_message_and_leaves_nothing(server, opened, tmp_path):
    there = opened()
    there.row(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # as a full disk: writing beyond fails with an errno
    try:
        with pytest.raises(UserError, match=r"remote.cache, .*, cannot be used \(.*\): free some space"):
            there.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
    assert there.read(0)


def test_a_full_disk_makes_room_of_what_nobody_reads(data, server, opened, monkeypatch):
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


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_what_comes_next_is_fetched_before_it_is_asked_for_and_kept(server, opened):
    one, other = opened(downloads=3), opened(downloads=3)
    server.faults = {f"{n:05d}.tar": ["slow", None] for n in range(10)}
    one.expect([7, 2, 5])
    other.expect([1, 8])  # one fetches ahead for all
    wait_for(lambda: len(list(one.directory.glob("*.tar"))) == 3)
    assert sorted(p.name for p in one.directory.glob("*.tar")) == ["00002.tar", "00005.tar", "00007.tar"]
    assert server.requests["00001.tar"] == 0
    assert one._room.clear()  # takes the sidecars, which are read in whole, and no tar that will be read
    assert len(list(one.directory.glob("*.tar"))) == 3
    asked = server.requests["00007.tar"]
    one.read(7 * PER_SHARD)
    assert server.requests["00007.tar"] == asked == 1
    one.expect([5])
    wait_for(lambda: one._room.clear() or len(list(one.directory.glob("*.tar"))) == 1)
    one = None
    wait_for(lambda: (other.expect([1]), other.expect([8]), server.requests["00008.tar"])[2])  # the next one leads


def test_fetching_ahead_goes_no_further_than_there_is_room(server, opened):
    there = opened(gigabytes=room_for(opened(), 3), downloads=1)
    there.expect(list(range(10)))
    wait_for(lambda: not there._ahead._wanted)
    wait_for(lambda: len(list(there.directory.glob("*.tar"))) == 3)
    assert sorted(p.name for p in there.directory.glob("*.tar")) == [f"{n:05d}.tar" for n in range(3)]


def test_a_process_that_is_killed_in_a_download_leaves_it_to_the_next(data, server, opened, tmp_path):
    server.faults = {"00000.tar": ["hold", None]}
    there = opened()
    child = multiprocessing.get_context("fork").Process(target=there.read, args=(0,))
    child.start()
    wait_for(lambda: server.requests["00000.tar"])
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert leftovers(tmp_path)
    assert there.read(0) == Dataset.open(data).read(0)
    assert leftovers(tmp_path) == []


class Numbers:
    """A tokenizer: a text is its length."""

    def __call__(self, texts, max_length):
        return [[0, len(words), 2] for words in texts]


@pytest.fixture
def recipe(tmp_path, recipes):
    def execute(corpus, *settings, batch=4) -> Recipe:
        overrides = [
            f"corpus={corpus}", "data={text: [{path: text-pairs/made}]}", f"batch={{text: {batch}}}", "steps=40",
            f"remote.cache={tmp_path}/cache", "remote.retries=1", *settings,
        ]  # fmt: skip
        return load(recipes / "drawn.yaml", overrides, 1).recipe

    return execute


def steps(recipe, rank=0, world=1, workers=0, stop=8):
    made = StageBatches(recipe, recipe.stage(1), 1, Numbers(), rank, world)
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


def test_the_sampler_fetches_its_next_window_while_it_reads_this_one(data, server, recipe):
    made = StageBatches(recipe(server.url, batch=2), recipe(server.url, batch=2).stage(1), 1, Numbers(), 0, 1)
    made[0]
    order = made.text_sampler.orders[0].shards(0, SAMPLES)
    wait_for(lambda: len(list(made.text_sources[0].directory.glob("*.tar"))) >= 8)
    assert {p.name for p in made.text_sources[0].directory.glob("*.tar")} == {f"{n:05d}.tar" for n in order[:8]}


def test_shards_ahead_are_those_that_the_stream_reads():
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    order, ends = SourceOrder(sizes, seed=3), [sum(sizes[: i + 1]) for i in range(10)]
    for start, stop in ((0, 1), (5, 30), (38, 45), (0, 200)):
        read = [next(i for i, end in enumerate(ends) if order.at(p)[1] < end) for p in range(start, stop)]
        assert set(read) <= set(order.shards(start, stop))
    assert len(order.shards(0, 1)) == 8
    assert len(order.shards(0, 200)) == 10


def test_the_samples_of_a_broken_shard_are_all_replaced_from_one_other(data):
    here = Dataset.open(data)
    for shard in range(10):
        of_whole = [_replacement(here, index, 0, True) for index in here.samples_of(shard)]
        assert len({here.shard_of(index) for index in of_whole}) == 1
        of_one = {index: _replacement(here, index, 0, False) for index in here.samples_of(shard)}
        assert all(index != other and here.shard_of(other) == shard for index, other in of_one.items())
        assert {here.shard_of(_replacement(here, here.samples_of(shard)[0], n, False)) for n in range(16)} != {shard}


def test_a_broken_shard_becomes_entries_of_the_ledger(data, server, recipe, tmp_path):
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
    with pytest.raises(UserError, match=r"remote.gigabytes is 0.0001, but a step .* need 0.000[67]"):
        steps(recipe(server.url, "remote.gigabytes=0.0001"))


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
    with pytest.raises(UserError, match="'remote.downloads' should be at least 1"):
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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {here}/{name}; exit 3", r"pipe:.* …/.*manifest.json: the command failed \(exit status 3\)"),
        ("kill -9 $$ {name}", r"the command failed \(signal 9\)"),
        ("no-such-program-5 {name}", r"exit status 127"),
        ("sleep 60 & sleep 60; echo {name}", "the command was silent for 0.3 s"),
    ],
)
def test_a_command_that_fails_or_hangs_is_one_message(data, opened, waits, command, message):
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        opened("pipe:" + command.replace("{here}", str(data.parents[2])), allow_pipe=True, timeout=0.3, retries=1)
    assert "exit 3" not in str(caught.value)  # a command may hold a password
    assert time.monotonic() - began < 30


def test_a_command_that_never_ends_its_output_is_cut_off(data, opened, waits):
    there = opened(f"pipe:case {{name}} in *.tar) yes;; *) cat {data.parents[2]}/{{name}};; esac", allow_pipe=True)
    with pytest.raises(ShardUnavailable, match="more than the [0-9]+ bytes came"):
        there.read(0)


def test_names_reach_a_command_as_words():
    address = Address("pipe:cat {name}", "a b/$(reboot)")
    assert address.of("x.tar") == "cat 'a b/$(reboot)/x.tar'"


@pytest.mark.parametrize(
    ("base", "message"), [("s3://me:pw@bucket/c", "s3://bucket/c.*s3fs"), ("nonsense://x/y", "Protocol not known")]
)
def test_a_scheme_that_nothing_here_opens_is_one_message(opened, base, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(base)
    assert "pw" not in str(caught.value)


def test_what_fsspec_cannot_find_is_missing(tmp_path, opened, data):
    (data / "00000.tar").unlink()
    there = opened(f"file://{tmp_path}/corpus")
    with pytest.raises(ShardUnavailable, match="00000.tar: there is no such file"):
        there.read(0)


def test_other_peoples_tars_with_their_sidecars_beside_them_serve(tmp_path, recipe):
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
    with contextlib.closing(Server(tmp_path / "corpus")) as server:
        server.close = lambda: (server.shutdown(), server.server_close())
        settings = [f"data={{image_text: [{{path: {path}}}]}}", "batch={image_text: 4}"]
        here, there = (steps(recipe(corpus, *settings)) for corpus in (tmp_path / "corpus", server.url))
    assert len(here) == 8
    assert all(torch.equal(a.images, b.images) for (a, _), (b, _) in zip(here, there, strict=True))
