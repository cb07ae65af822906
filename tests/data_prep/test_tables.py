"""Tables of samples and of shards: mapped, the same bytes for the same content, and nothing foreign passes for one."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_prep.cli import main
from data_prep.shards import Dataset, DatasetWriter, ShardError, ShardUnavailable, manifest
from lines import as_lines


@pytest.fixture
def with_table(monkeypatch):
    """Data sets that are written now have a table of shards, however few they are."""
    monkeypatch.setattr(manifest, "LISTED", 0)


def everything(data: Dataset) -> list[object]:
    return [(data.row(index), data.read(index), data.name(index)) for index in range(len(data))]


def rewritten(path: Path, content: bytes) -> None:
    """Another content of a sidecar or of the table of shards, which the manifest describes correctly."""
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    place = path.parent / "manifest.json"
    text = place.read_text().replace(hashlib.sha256(before).hexdigest(), hashlib.sha256(content).hexdigest())
    place.write_text(text.replace(f'bytes": {len(before)},', f'bytes": {len(content)},', 1))


def with_value(path: Path, field: str, value: object) -> bytes:
    """The table in a file, with another value in its second record."""
    table = np.load(path)
    table[field][1] = value
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


def test_data_sets_of_the_form_before_hold_the_same_samples(write_dataset, tmp_path, capsys):
    now, before = write_dataset("now"), as_lines(write_dataset("before"))
    assert not list(before.glob("*.npy"))
    fingerprint = hashlib.sha256((before / "manifest.json").read_bytes()).hexdigest()
    old, new = Dataset.open(before, verify=True), Dataset.open(now, verify=True)
    assert everything(old) == everything(new)
    assert (old.shard_sizes, old.kind, old.fingerprint) == (new.shard_sizes, new.kind, fingerprint)
    assert everything(pickle.loads(pickle.dumps(old))) == everything(new)
    assert main(["inspect", str(before), "--out", str(tmp_path / "page.html")]) == 0
    assert {shard["name"] for shard in old.manifest["shards"]} == {f"0000{n}.tar" for n in range(3)}


def test_a_table_of_shards_says_what_a_list_of_them_says(write_dataset, with_table, monkeypatch):
    tabled = write_dataset("tabled")
    monkeypatch.setattr(manifest, "LISTED", 1000)
    listed, again = write_dataset("listed"), tabled.with_name("again")
    one, other = Dataset.open(tabled, verify=True), Dataset.open(listed, verify=True)
    assert everything(one) == everything(other)
    assert one.manifest == other.manifest == json.loads((listed / "manifest.json").read_bytes())
    assert [one.shard(number) for number in range(3)] == [other.shard(number) for number in range(3)]
    field = json.loads((tabled / "manifest.json").read_bytes())["shards"]
    raw = (tabled / "shards.npy").read_bytes()
    assert field == {"table": "shards.npy", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    monkeypatch.setattr(manifest, "LISTED", 0)
    assert (write_dataset(again.name) / "shards.npy").read_bytes() == raw
    assert np.load(tabled / "shards.npy", mmap_mode="r")["samples"].tolist() == [3, 3, 1]


def test_tars_of_others_keep_their_caption_keys_in_a_table(write_tar, tmp_path, with_table):
    picture = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for name in ("a", "b"):
        members = [(f"{name}/k.png", picture.getvalue()), (f"{name}/k.json", b'{"alt": "a dog"}')]
        write_tar(tmp_path / f"theirs/{name}.tar", members)
    command = ["index", str(tmp_path / "theirs"), "--caption-key", "alt", "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    data = Dataset.open(tmp_path / "out/image-short/indexed", verify=True)
    assert json.loads((data.directory / "manifest.json").read_bytes())["shards"]["caption_keys"] == ["alt"]
    assert [data.row(number).key for number in range(2)] == ["a/k", "b/k"]
    assert json.loads(data.read(1)["json"])["captions"][0]["text"] == "a dog"
    assert main(["validate", str(data.directory), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("json", (0, 2**40), "a member json ends outside of a tar of"),
        ("json", (2**64 - 1, 1), "a member json ends outside"),
        ("png", (2**64 - 512, 1024), "a member png ends outside"),  # their sum is 512
        ("tokens", -2, "a number of tokens below 0"),
        ("key", b"\xff", "codec can't decode"),
        ("languages", b"\xc3", "codec can't decode"),
    ],
)
def test_a_foreign_value_in_a_sidecar_is_one_message(write_dataset, field, value, message):
    path = write_dataset() / "00000.index.npy"
    rewritten(path, with_value(path, field, value))
    with pytest.raises(ShardUnavailable, match=rf"00000\.index\.npy: not a sidecar of trilith-shards/2 \(.*{message}"):
        Dataset.open(path.parent).row(0)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"PK" + raw[2:],
        lambda raw: raw[:6] + b"\2\0" + raw[8:],
        lambda raw: raw.replace(b"'|V32'", b"'|O32'"),
        lambda raw: raw.replace(b"'<i", b"'>i"),
        lambda raw: raw.replace(b"'sha256'", b"'sha257'"),
        lambda raw: raw.replace(b"'descr'", b"__import__"),
        lambda raw: raw[:10] + b"[" * (len(raw) - 10),
    ],
)
def test_what_is_no_table_is_one_message(write_dataset, monkeypatch, change):
    sidecar = write_dataset("listed") / "00000.index.npy"
    monkeypatch.setattr(manifest, "LISTED", 0)
    for path in (sidecar, write_dataset("tabled") / "shards.npy"):
        rewritten(path, change(path.read_bytes()))
        with pytest.raises(ShardError, match=r"(not a sidecar|not a manifest) of trilith-shards/2 \(.+\); build"):
            Dataset.open(path.parent).row(0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", b"../b.tar", "expected a name of letters"),
        ("name", b"", "expected a name of letters"),
        ("name", b"00000.tar", "lists the shard '00000.tar' twice"),
        ("samples", -1, "samples of a shard below 0"),
        ("index_bytes", 2**53, "index_bytes of a shard below 0 or over"),
        ("samples", 4, "do not add up to 7 samples"),
    ],
)
def test_a_foreign_value_in_the_table_of_shards_is_one_message(write_dataset, with_table, field, value, message):
    path = write_dataset() / "shards.npy"
    rewritten(path, with_value(path, field, value))
    with pytest.raises(ShardError, match=rf"manifest\.json: .*{message}"):
        Dataset.open(path.parent)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "of another data set"])
def test_a_table_of_shards_that_is_not_the_manifests_is_named(write_dataset, with_table, damage, capsys):
    path, other = write_dataset() / "shards.npy", write_dataset("other", samples=8) / "shards.npy"
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        made = {"cut": raw[:-9], "flipped": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]}
        path.write_bytes(made.get(damage, other.read_bytes()))
    with pytest.raises(ShardError, match=r"shards\.npy: (cannot be read|checksum differs from the manifest's)"):
        Dataset.open(path.parent)
    assert main(["validate", str(path.parent), "--workers", "1"]) == 1
    assert "shards.npy" in capsys.readouterr().err


def test_files_are_looked_at_when_asked_and_read_when_needed(write_dataset):
    directory = write_dataset()
    (directory / "00001.tar").unlink()
    data = Dataset.open(directory, check=False)
    assert data.read(0)
    with pytest.raises(ShardUnavailable, match=r"00001\.tar: cannot be read"):
        data.read(3)
    for check in (data.check, lambda: Dataset.open(directory)):
        with pytest.raises(ShardError, match=r"00001\.tar: missing, though the manifest lists it"):
            check()


def test_open_shards_leave_a_process_half_of_its_files(tmp_path):
    with DatasetWriter(tmp_path / "d", kind="text-pairs", source="s", samples_per_shard=1) as writer:
        for number in range(100):
            writer.write(f"k{number}", {"json": b"{}"}, languages=["en"], tokens=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * used + 100, hard))
    try:
        data = Dataset.open(tmp_path / "d")
        assert all(data.read(number) for number in range(100))
        assert len(list(Path("/proc/self/fd").iterdir())) <= used + (2 * used + 100) // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("languages", "tokens", "message"),
    [(["a/b"], 1, "expected names without /"), ([""], 1, "expected names"), (["en"], 2**31, "expected a number from")],
)
def test_what_a_table_cannot_hold_is_refused_where_it_is_written(tmp_path, languages, tokens, message):
    with (
        pytest.raises(ShardError, match=message),
        DatasetWriter(tmp_path / "d", kind="text-pairs", source="s") as writer,
    ):
        writer.write("k", {"json": b"{}"}, languages=languages, tokens=tokens)


def test_the_order_in_which_members_are_given_is_not_in_their_hash(tmp_path):
    for name, members in (("a", {"png": b"p", "json": b"j"}), ("b", {"json": b"j", "png": b"p"})):
        with DatasetWriter(tmp_path / name, kind="image-short", source="s") as writer:
            writer.write("k", members, languages=[], tokens=None)
        data = Dataset.open(tmp_path / name)
        assert data.row(0).sha256 == hashlib.sha256(b"pj").hexdigest()
        assert data.read(0) == {"png": b"p", "json": b"j"}
        assert (data.row(0).languages, data.row(0).tokens) == ((), None)


def test_processes_that_open_a_data_set_share_its_tables(write_dataset, with_table):
    directory = write_dataset()
    data = Dataset.open(directory)
    data.row(0)
    assert not data.shards.flags.owndata
    assert not data.shards.flags.writeable
    maps = Path("/proc/self/maps").read_text()
    assert all(str(directory / name) in maps for name in ("shards.npy", "00000.index.npy"))


def test_help_of_the_commands_loads_no_numpy():
    code = (
        "import sys; from {} import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'numpy' not in sys.modules"
    )
    for module in ("data_prep.cli", "stage_trainer.cli"):
        subprocess.run([sys.executable, "-c", code.format(module)], check=True, stdout=subprocess.DEVNULL)
