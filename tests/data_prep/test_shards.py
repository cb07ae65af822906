"""The shard format: written whole or not at all, the same bytes for the same samples, readable by anyone's loader."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_prep.shards import Dataset, DatasetWriter, ShardError, ShardUnavailable, writer
from data_prep.shards.files import _header
from data_prep.shards.format import parse_json
from lines import as_lines

import data_prep


def test_same_samples_give_same_bytes(write_dataset):
    one, two = write_dataset("one"), write_dataset("two")
    names = sorted(path.name for path in one.iterdir())
    assert names == [*sorted(f"0000{n}.{end}" for n in range(3) for end in ("tar", "index.npy")), "manifest.json"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_tarfile_finds_every_member_at_the_offset_that_the_sidecar_gives(write_dataset):
    directory = write_dataset()
    for index in sorted(directory.glob("*.index.npy")):
        rows = np.load(index, mmap_mode="r")  # numpy's own reader
        places = {f"{row['key'].decode()}.{end}": row[end].tolist() for row in rows for end in ("png", "json")}
        with tarfile.open(directory / index.name.replace("index.npy", "tar")) as tar:
            assert {info.name: [info.offset_data, info.size] for info in tar.getmembers()} == places
            assert all((info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "") for info in tar.getmembers())


def test_headers_are_those_of_tarfile():
    for name, size in (("a.json", 0), ("k" * 90 + ".json", 511), ("x.png", 8**11 - 1)):
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o444
        assert _header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    with pytest.raises(ShardError, match="members of 8 GiB"):
        _header("a.png", 8**11)


def test_webdatasets_own_reader_sees_the_same_samples(write_dataset):
    import webdataset  # slow to load, and only here

    directory = write_dataset()
    dataset = Dataset.open(directory)
    shards = [str(path) for path in sorted(directory.glob("*.tar"))]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [dataset.row(index).key for index in range(7)]
    for index, sample in enumerate(found):
        assert dataset.read(index) == {"png": sample["png"], "json": sample["json"]}


def test_any_sample_by_number(write_dataset):
    dataset = Dataset.open(write_dataset(), verify=True)
    assert (len(dataset), dataset.shard_sizes) == (7, (3, 3, 1))
    assert (dataset.kind, dataset.source) == ("image-short", "made")
    row = dataset.row(5)
    assert (row.key, row.shard, row.tokens, row.languages) == ("key-5", "00001.tar", 5, ("de", "zh"))
    members = dataset.read(5)
    assert members["png"] == bytes([5]) * 501
    assert row.sha256 == hashlib.sha256(members["png"] + members["json"]).hexdigest()
    assert dataset.fingerprint == hashlib.sha256((dataset.directory / "manifest.json").read_bytes()).hexdigest()
    for outside in (-1, 7):
        with pytest.raises(IndexError, match="has 7"):
            dataset.row(outside)


def test_threads_and_worker_processes_read_what_one_reader_reads(write_dataset):
    dataset = Dataset.open(write_dataset())
    alone = [dataset.read(index) for index in range(7)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.read, list(range(7)) * 50)) == alone * 50
    assert pickle.loads(pickle.dumps(dataset)).read(6) == alone[6]


@pytest.mark.parametrize("name", ["00001.tar", "00001.index.npy"])
def test_missing_file_is_named(write_dataset, name):
    directory = write_dataset()
    (directory / name).unlink()
    with pytest.raises(ShardError, match=f"{name}: missing"):
        Dataset.open(directory)


@pytest.mark.parametrize("name", ["00001.tar", "00001.index.npy"])
def test_half_written_file_is_named(write_dataset, name):
    directory = write_dataset()
    data = (directory / name).read_bytes()
    (directory / name).chmod(0o644)
    (directory / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match=f"{name}: has {len(data) // 2} bytes, the manifest says {len(data)}"):
        Dataset.open(directory)


def test_a_flipped_byte_is_found_by_verify_and_by_reading(write_dataset):
    directory = write_dataset()
    offset, _ = Dataset.open(directory).row(4).members["png"]
    data = bytearray((directory / "00001.tar").read_bytes())
    data[offset] ^= 1
    (directory / "00001.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"00001\.tar: checksum differs"):
        Dataset.open(directory, verify=True)
    dataset = Dataset.open(directory)
    assert dataset.read(3)
    with pytest.raises(ShardError, match=r"00001\.tar: sample 'key-4' is damaged"):
        dataset.read(4)


def test_no_manifest_no_folder_and_another_schema_say_what_to_do(write_dataset, tmp_path):
    with pytest.raises(ShardError, match=r"nowhere: no such data set; build it first"):
        Dataset.open(tmp_path / "nowhere")
    directory = write_dataset()
    manifest = directory / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace("trilith-shards/2", "trilith-shards/9"))
    with pytest.raises(
        ShardError, match="schema 'trilith-shards/9', expected 'trilith-shards/2' or 'trilith-shards/1'"
    ):
        Dataset.open(directory)
    manifest.write_text(text[:50])
    with pytest.raises(ShardError, match=r"manifest\.json: not a manifest"):
        Dataset.open(directory)
    manifest.unlink()
    with pytest.raises(ShardError, match=r"manifest\.json: missing, so this is no finished data set"):
        Dataset.open(directory)


def test_a_manifest_that_names_files_elsewhere_is_refused(write_dataset):
    directory = write_dataset()
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"00001.tar"', '"../00001.tar"'))
    with pytest.raises(ShardError, match=r"names the shard '../00001.tar', which would lie outside"):
        Dataset.open(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("source"), "'source' is missing"),
        (lambda m: m.update(source=3), "3, expected a text"),
        (lambda m: m.update(kind=["image-long"]), r"\['image-long'\], expected a text"),
        (lambda m: m.update(shards=None), "NoneType"),
        (lambda m: m["shards"][0].update(samples=-1), "-1, expected a whole number from 0"),
        (lambda m: m["shards"][0].update(samples=True), "True, expected a whole number"),
        (lambda m: m["shards"][0].update(bytes=2**70), "1180591620717411303424, expected a whole number"),
        (lambda m: m["shards"][0].update(index_bytes=1e3), "1000.0, expected a whole number"),
        (lambda m: m["shards"][0].update(name="a\0.tar"), r"'a\\x00.tar', expected a name of printable characters"),
        (lambda m: m["shards"][0].update(name="\ud800.tar"), r"'\\ud800.tar', expected a name of printable"),
        (lambda m: m["shards"][0].update(name=".."), "would lie outside of the data set"),
        (lambda m: m["shards"][0].update(name=""), "expected a name of printable"),
        (lambda m: m["shards"][1].update(name="00000.tar"), "lists the shard '00000.tar' twice"),
        (lambda m: m["shards"][0].update(sha256="0" * 63), "expected a sha256 of 64 hex digits"),
        (lambda m: m.update(samples="7"), "'7', expected a whole number"),
    ],
)
def test_a_manifest_of_other_types_is_one_message(write_dataset, change, message):
    path = write_dataset() / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=rf"manifest\.json: .*{message}"):
        Dataset.open(path.parent)
    path.write_text("[" * 100_000)
    with pytest.raises(ShardError, match=r"manifest\.json: not a manifest"):
        Dataset.open(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(key=["a"]),
        lambda row: row.update(members=None),
        lambda row: row.update(members={"json": [0, 2**62]}),
        lambda row: row.update(members={"json": [2**70, 1]}),
        lambda row: row.update(members={"json": [-1, 1]}),
        lambda row: row.update(members={"json": ["0", 1]}),
        lambda row: row.update(members={"json": [0]}),
        lambda row: row.update(languages=["de", None]),
        lambda row: row.update(languages="de"),
        lambda row: row.update(tokens="many"),
        lambda row: row.update(sha256=None),
        lambda row: row.pop("tokens"),
    ],
)
def test_a_line_of_a_sidecar_of_other_types_is_one_message(write_dataset, change):
    directory = as_lines(write_dataset())
    path, manifest = directory / "00000.index.jsonl", json.loads((directory / "manifest.json").read_bytes())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[1])
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.unlink()
    path.write_bytes(raw)
    manifest["shards"][0] |= {"index_bytes": len(raw), "index_sha256": hashlib.sha256(raw).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardUnavailable, match=r"00000\.index\.jsonl: not a sidecar of trilith-shards/1 \(.+\); build"):
        Dataset.open(directory).row(0)


def test_languages_with_unicodes_line_ends_are_read_as_written(tmp_path):
    languages = ["a\u2028", "b\x85", "c\x1c"]
    with DatasetWriter(tmp_path / "data", kind="text-pairs", source="s", samples_per_shard=2) as writer:
        writer.write("k", {"json": b"{}"}, languages=languages, tokens=None)
    assert Dataset.open(tmp_path / "data").row(0).languages == tuple(languages)


def test_a_shard_that_goes_missing_is_unavailable_and_its_samples_still_have_names(write_dataset):
    directory = write_dataset()
    dataset = Dataset.open(directory)
    (directory / "00000.tar").unlink()
    (directory / "00001.index.npy").unlink()
    for index, name in ((0, "00000.tar"), (3, "00001.index.npy")):
        with pytest.raises(ShardUnavailable, match=f"{name}: cannot be read"):
            dataset.read(index)
    assert [dataset.name(index) for index in (0, 4, 6)] == [
        ("00000.tar", "key-0"),
        ("00001.tar", "#1"),
        ("00002.tar", "key-6"),
    ]


@pytest.mark.parametrize("change", ["swapped", "edited"])
def test_a_sidecar_that_is_not_the_manifests_is_noticed_where_it_is_read(tmp_path, change):
    """Shards of equal sizes with each other's names pass the comparison of sizes and the hashes of samples."""
    directory = tmp_path / "d"
    with DatasetWriter(directory, kind="text-pairs", source="s", samples_per_shard=1) as writer:
        for key in "abc":
            writer.write(key, {"json": b"{}"}, languages=["en"], tokens=None)
    for end in ("tar", "index.npy"):
        one, other = (directory / f"0000{number}.{end}" for number in (0, 1))
        one.chmod(0o644)
        if change == "swapped":
            content = one.read_bytes()
            one.unlink()
            other.rename(one)
            other.write_bytes(content)
        elif end == "index.npy":
            one.write_bytes(one.read_bytes().replace(b"en", b"de", 1))
    dataset = Dataset.open(directory)
    with pytest.raises(ShardUnavailable, match=r"00000\.index\.npy: checksum differs from the manifest's"):
        dataset.read(0)
    assert dataset.read(2) == {"json": b"{}"}


def write_texts(directory: Path, keys: list[str], size: int = 2, stop: Exception | None = None) -> None:
    """A data set of text pairs of `size` bytes, with an exception before its end if one is given."""
    with DatasetWriter(directory, kind="text-pairs", source="s") as writer:
        for key in keys:
            writer.write(key, {"json": b" " * size}, languages=["en"], tokens=None)
        if stop:
            raise stop


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        write_texts(tmp_path / "d", ["a"], stop=RuntimeError("stop"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_replaced(tmp_path):
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "00007.tar").write_bytes(b"half")
    write_texts(tmp_path / "d", ["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert not (tmp_path / "d" / "00007.tar").exists()
    assert len(Dataset.open(tmp_path / "d", verify=True)) == 1


def test_a_disk_that_refuses_gives_one_error_that_names_the_file_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # as a full disk: writing beyond fails with an errno
    try:
        with pytest.raises(ShardError, match=r"d\.partial/00000\.tar: cannot be written"):
            write_texts(tmp_path / "d", [f"k{number}" for number in range(8)], size=32 * 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_data_set_is_not_touched(write_dataset):
    directory = write_dataset()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(ShardError, match="exists already"), DatasetWriter(directory, kind="text-pairs", source="s"):
        pass
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("kind", "key", "members", "complaint"),
    [
        ("image-short", "a.b", {"png": b"", "json": b""}, "'a.b'"),
        ("image-short", "", {"png": b"", "json": b""}, "''"),
        ("image-short", "a", {"json": b""}, "one of jpg, jpeg, png, webp"),
        ("image-long", "a", {"png": b"", "jpg": b"", "txt": b""}, "one of jpg, jpeg, png, webp"),
        ("image-long", "a", {"png": b""}, "json or txt"),
        ("text-pairs", "a", {"txt": b""}, "expected json alone"),
    ],
)
def test_a_sample_that_does_not_fit_its_kind_is_refused(tmp_path, kind, key, members, complaint):
    with pytest.raises(ShardError, match=complaint), DatasetWriter(tmp_path / "d", kind=kind, source="s") as writer:
        writer.write(key, members, languages=[], tokens=None)


def test_double_keys_no_samples_and_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(ShardError, match="'a' comes twice"):
        write_texts(tmp_path / "d", ["a", "a"])
    with pytest.raises(ShardError, match="no sample"):
        write_texts(tmp_path / "d", [])
    with pytest.raises(ShardError, match="unknown kind of data set 'pairs'; there are text-pairs"):
        DatasetWriter(Path("d"), kind="pairs", source="s")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff", b"\xef\xbb\xbf{}x", "\ud800", b"\0"]
)
def test_what_is_no_json_is_a_value_error_whatever_is_wrong_with_it(raw):
    with pytest.raises(ValueError, match="."):
        parse_json(raw)


def test_json_is_parsed_in_one_place():
    """Elsewhere the one or the other of its many errors would be forgotten."""
    sources = Path(data_prep.__file__).parent
    found = [
        f"{path.relative_to(sources)}: {line.strip()}"
        for path in sources.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"json\.loads?\((?!json\.dumps)", line)
    ]
    assert found == ["shards/format.py: return json.loads(raw)"]


def test_a_shard_is_closed_at_a_number_of_samples_or_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 10_000)
    with DatasetWriter(tmp_path / "d", kind="text-pairs", source="s", samples_per_shard=3) as made:
        for number, size in enumerate((1, 1, 1, 6000, 6000, 6000, 1)):
            made.write(f"k{number}", {"json": b" " * size}, languages=["en"], tokens=None)
    assert Dataset.open(tmp_path / "d", verify=True).shard_sizes == (3, 2, 2)
