"""One file fetched, and all that may go wrong on the way."""

import base64
import pickle
import time
import urllib.request

import fsspec
import pytest
from data_prep.shards import Dataset, ShardError, ShardUnavailable
from stage_trainer.data import download, http
from stage_trainer.errors import UserError
from stage_trainer.recipe import RemoteConfig
from stage_trainer.recipe.address import Address, without_credentials


def test_what_is_read_from_a_url_is_what_lies_in_the_folder(data, server, opened, everything, leftovers):
    here, there = Dataset.open(data), opened()
    assert (there.fingerprint, there.shard_sizes, there.kind) == (here.fingerprint, here.shard_sizes, here.kind)
    assert server.requests == {"manifest.json": 1}
    assert everything(there) == everything(here)
    assert [there.row(i) for i in range(len(here))] == [here.row(i) for i in range(len(here))]
    assert set(server.requests) == {p.name for p in data.iterdir()}
    assert set(server.requests.values()) == {1}
    assert leftovers() == []
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
def test_what_passes_is_tried_again(data, server, opened, waits, fault, least_wait, everything, leftovers):
    server.faults = {
        "00003.tar": [fault, None],
        "00004.index.npy": [fault, fault, None],
        "manifest.json": [503, None],
    }
    patience = {"timeout": 1} if fault == "silence" else {}  # a busy machine is silent for a while, too
    assert everything(opened(**patience)) == everything(Dataset.open(data))
    assert (server.requests["00003.tar"], server.requests["00004.index.npy"]) == (2, 3)
    assert len(waits) == 4
    assert min(waits[1:]) >= least_wait
    assert max(waits) <= download.LONGEST_WAIT
    assert leftovers() == []


def test_a_date_in_retry_after_is_understood(monkeypatch):
    monkeypatch.setattr(http.time, "time", lambda: 1445412480.0)  # RFC 9110's own example of a date
    assert http._retry_after("Wed, 21 Oct 2015 07:28:30 GMT") == 30
    assert http._retry_after("Wed, 21 Oct 2015 07:27:30 GMT") == 0


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (404, "404 Not Found", 1), (403, "403 Forbidden: the credentials are missing, wrong or out of date", 1),
        (500, "500 Internal Server Error", 5), ("cut", "bytes came|the connection was cut", 5),
        ("wrong bytes", "not those of the manifest's sha256", 3), ("too short", "bytes came, the manifest says", 5),
        ("too long", "more than the [0-9]+ bytes", 3), ("silence", "no answer for 0.2 s", 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["00003.tar", "00003.index.npy"])
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


@pytest.mark.parametrize("name", ["00000.tar", "00000.index.npy"])
def test_a_server_that_is_gone_ends_the_run_and_costs_no_samples(server, opened, waits, name):
    there = opened()
    server.faults = {name: [503] for name in ("manifest.json", name)}
    with pytest.raises(UserError, match=rf"{name}: 503 .* manifest.json beside it cannot be fetched either \(503 .*\)"):
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
    with pytest.raises(ShardError, match="not a manifest of trilith-shards/2"):
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


def test_a_redirection_is_followed_and_takes_no_password_along(data, server, serve, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "_is_local", lambda host: False)  # as for two servers of the internet
    other = serve(tmp_path / "corpus")
    target = f"{other.url}/train/text-pairs/made/00000.tar"
    server.faults = {"00000.tar": [(302, {"Location": target})]}
    there = opened(server.url.replace("http://", "http://user:password@"))
    assert there.read(0) == Dataset.open(data).read(0)
    assert all("Authorization" in headers for _, headers in server.headers)
    assert [("Authorization" in headers) for _, headers in other.headers] == [False]


@pytest.mark.parametrize("size", ["9" * 20, "1000000"])
def test_the_body_of_a_redirection_is_not_read(data, server, serve, opened, waits, tmp_path, monkeypatch, size):
    monkeypatch.setattr(http, "_is_local", lambda host: False)
    target = f"{serve(tmp_path / 'corpus').url}/train/text-pairs/made/00000.tar"
    server.faults = {"00000.tar": [(302, {"Location": target, "Content-Length": size})]}
    assert opened(retries=0).read(0) == Dataset.open(data).read(0)


def test_a_redirection_in_a_circle_is_one_message(server, opened, waits):
    server.faults = {"00000.tar": [(302, {"Location": "00000.tar"})]}
    with pytest.raises(ShardUnavailable, match="infinite loop"):
        opened(retries=0).read(0)


@pytest.mark.parametrize(
    "target", ["ftp://{0}/00000.tar", "file:///etc/hostname", "http://{0}/00000.tar", "http://localhost:{1}/"]
)
def test_no_redirection_leads_to_files_to_ftp_or_into_this_machine(server, serve, opened, waits, tmp_path, target):
    other = serve(tmp_path / "corpus")
    target = target.format(other.url.removeprefix("http://"), other.server_port)
    server.faults = {"00000.tar": [(302, {"Location": target})]}
    with pytest.raises(
        ShardUnavailable, match="redirects to .*, which is not followed|Redirection to url .* is not allowed"
    ):
        opened().read(0)
    assert not other.requests


def test_a_redirection_from_https_to_http_is_not_followed():
    request = urllib.request.Request("https://data.example/a")
    with pytest.raises(http.Failure, match="redirects to http://data.example/b"):
        http.Redirects().redirect_request(request, None, 302, "", {}, "http://data.example/b")


@pytest.mark.parametrize("fault", ["slow bytes", "slow headers"])
def test_a_byte_at_a_time_does_not_outlive_the_deadline(server, opened, waits, fault):
    server.faults = {"00000.tar": [fault]}
    with pytest.raises(ShardUnavailable, match=r"00000.tar: not whole after remote.deadline=0.5 s"):
        opened(deadline=0.5, retries=1).read(0)
    assert server.requests["00000.tar"] == 2


def test_a_command_that_never_ends_does_not_outlive_the_deadline(tmp_path):
    settings = RemoteConfig(deadline=0.3, retries=0, allow_pipe=True)
    with pytest.raises(http.Failure, match=r"not done after remote.deadline=0.3 s"):
        download.fetch(Address("pipe:while sleep 0.05; do printf {name}; done"), "x", tmp_path / "x", settings, 10**9)


@pytest.mark.parametrize("scheme", ["http", "memory"])
def test_a_manifest_without_end_fills_no_memory(data, server, opened, waits, scheme):
    manifest = data / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" " * 3_000_000)
    base = server.url
    if scheme == "memory":
        base = "memory://corpus"
        fsspec.filesystem("memory").pipe("/corpus/train/text-pairs/made/manifest.json", manifest.read_bytes())
    with pytest.raises(UserError, match=r"manifest.json: more than the 2000000 bytes .* remote.manifest_megabytes is"):
        opened(base, manifest_megabytes=2)
    assert len(opened(base, manifest_megabytes=4)) == 20


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
    assert without_credentials(text) == shown
    assert without_credentials('bucket "me:pw@b"', "s3://me:pw@b/c") == 'bucket "b"'


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {here}/{name}; exit 3", r"pipe:.* …/.*manifest.json: the command failed \(exit status 3\)"),
        ("kill -9 $$ {name}", r"the command failed \(signal 9\)"),
        ("no-such-program-5 {name}", r"exit status 127"),
        ("sleep 1000 & sleep 1000; echo {name}", "the command was silent for 0.3 s"),
    ],
)
def test_a_command_that_fails_or_hangs_is_one_message(data, opened, waits, command, message):
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        opened("pipe:" + command.replace("{here}", str(data.parents[2])), allow_pipe=True, timeout=0.3, retries=1)
    assert "exit 3" not in str(caught.value)  # a command may hold a password
    assert time.monotonic() - began < 500


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
