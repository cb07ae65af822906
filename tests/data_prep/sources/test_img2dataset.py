"""img2dataset's folders and subsets of them: gaps, unfinished shards, damaged tars, uids."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_prep.errors import UserError
from data_prep.image_rule import ImageRule
from data_prep.sources.img2dataset import shard_pieces

Member = tuple[str, bytes]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


@pytest.fixture
def shard(folder, picture) -> Callable[..., Path]:
    """Writes NNNNN.tar and its _stats.json: shard(3, count=2, failed=1), or with members of one's own."""

    def write(number: int, count: int = 2, *, failed: int = 0, members: list[Member] | None = None, **fields) -> Path:
        if members is None:
            members = []
            for place in range(count):
                key = f"{number:05d}{place:04d}"
                metadata = {
                    "caption": f"caption {key}",
                    "url": f"https://example.org/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 64,
                    "height": 48,
                    "original_width": 640,
                    "original_height": 480,
                    "exif": "{}",
                    "sha256": f"{number + place:064x}",
                    **fields,
                }
                members += [(f"{key}.jpg", picture(place)), (f"{key}.txt", f"caption {key}".encode())]
                members.append((f"{key}.json", json.dumps(metadata, indent=4).encode()))
        path = folder / f"{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        stats = {
            "count": count + failed,
            "successes": count,
            "failed_to_download": failed,
            "failed_to_resize": 0,
            "duration": 1.5,
            "status_dict": {"success": count, "HTTP Error 404: Not Found": failed},
        }
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))
        return path

    return write


def test_gaps_and_failures_are_no_trouble_and_equal_downloads_are_one_item(shard, folder, run, snapshot):
    shard(0)
    shard(7, failed=3)
    before = snapshot(folder)
    found = run("img2dataset", folder=folder, language="en", image=ImageRule(32, "square"))
    samples = found.samples["image-short"]
    assert [sample.captions[0] for sample in samples] == [
        f"caption {key}" for key in ("000000000", "000000001", "000070000", "000070001")
    ]
    assert samples[0].content["item"] == f"img2dataset/{0:064x}"
    assert all(sample.size == (32, 32) for sample in samples)
    assert found.dropped == {"img2dataset: failed to download": 3}
    assert found.receipt["came_in"] == 7
    assert snapshot(folder) == before


def test_a_shard_without_stats_is_not_finished(shard, folder, run):
    shard(0)
    shard(1)
    (folder / "00001_stats.json").unlink()
    shard(2)
    (folder / "00002_stats.json").write_text("{cut")
    for number, content in enumerate(('{"failed_to_download": Infinity}', "[" * 99_999), 3):
        shard(number)
        (folder / f"0000{number}_stats.json").write_text(content)
    found = run("img2dataset", folder=folder)
    assert found.receipt["went_out"] == {"image-short": 2}
    assert found.dropped == {
        "shard whose _stats.json cannot be read": 3,
        "shard without _stats.json: not finished (--without-stats reads it)": 1,
    }
    again = run("img2dataset", folder=folder, without_stats=True, out=folder.parent / "again")
    assert again.receipt["went_out"] == {"image-short": 4}
    assert again.dropped == {"shard whose _stats.json cannot be read": 3}


def test_what_is_wrong_with_a_sample_is_counted_by_reason(shard, folder, run, picture):
    good = json.dumps({"caption": "fine", "status": "success"}).encode()
    members = [
        ("a.jpg", picture()),
        ("a.json", good),
        ("b.json", good),
        ("c.jpg", b"broken"),
        ("c.json", good),
        ("d.jpg", picture()),
        ("d.json", b"{cut"),
        ("e.jpg", picture()),
        ("e.json", json.dumps({"caption": None, "status": "success"}).encode()),
        ("f.jpg", picture()),
        ("f.json", json.dumps({"caption": "x", "status": "failed_to_resize"}).encode()),
        ("../g.jpg", picture()),
        ("../g.json", good),
        ("h.i.jpg", picture()),
        ("h.i.json", good),
        ("j.jpg", picture()),
        ("j.txt", b"from the text"),
        ("j.jpg", picture(1)),
        ("k.pickle", pickle.dumps(print)),
        ("k.jpg", picture()),
        ("k.txt", b"never unpickled"),
    ]
    shard(0, members=members)
    found = run("img2dataset", folder=folder)
    assert [sample.captions for sample in found.samples["image-short"]] == [
        ["fine"],
        ["fine"],
        ["from the text"],
        ["never unpickled"],
    ]
    assert found.dropped == {
        "a name that leads out of the tar": 2,
        "img2dataset: failed to resize": 1,
        "metadata that is no JSON object": 1,
        "no caption": 1,
        "no image": 1,
        "not an image": 1,
        "second member of one name": 1,
    }


@pytest.mark.parametrize("where", ["header", "data", "end"])
def test_a_tar_that_is_cut_gives_the_samples_before_and_says_so(shard, folder, run, where):
    path = shard(0, count=4)
    with tarfile.open(path) as tar:
        third = tar.getmember("000000002.jpg")
        last = tar.getmembers()[-1]
    cut = {"header": third.offset + 100, "data": third.offset_data + 50, "end": last.offset_data + last.size}[where]
    path.write_bytes(path.read_bytes()[:cut])
    found = run("img2dataset", folder=folder)
    assert len(found.samples["image-short"]) == (4 if where == "end" else 2)
    assert found.dropped == {"rest of a tar that is cut short or damaged": 1}


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(shard, folder, run):
    path = shard(0, count=4)
    with tarfile.open(path) as tar:
        third = tar.getmember("000000002.jpg")
    data = bytearray(path.read_bytes())
    data[third.offset : third.offset + 512] = b"x" * 512
    path.write_bytes(data)
    found = run("img2dataset", folder=folder)
    assert len(found.samples["image-short"]) == 2
    assert found.dropped == {"rest of a tar that is cut short or damaged": 1}


def test_captions_are_those_of_the_named_fields_word_for_word(shard, folder, run, picture):
    metadata = [
        {"alt": "one", "meta": {"texts": ["two", " ", "one", 3]}},
        {"alt": ["a", "b"], "meta": [{"texts": "c"}, {"texts": ["d"]}, 7]},
        {"caption": "another field", "alt": ""},
    ]
    members = []
    for number, fields in enumerate(metadata):
        members += [(f"{number}.jpg", picture()), (f"{number}.json", json.dumps(fields).encode())]
        members.append((f"{number}.txt", b"not asked for"))
    shard(0, members=members)
    found = run("img2dataset", folder=folder, caption_key="alt,meta.texts")
    assert [sample.captions for sample in found.samples["image-short"]] == [["one", "two"], ["a", "b", "c", "d"]]
    assert found.dropped == {"no caption": 1}


def test_captions_by_language_come_in_their_languages(shard, folder, run, picture):
    fields = {"caption": {"en": "a dog", "pt-BR": ["um cão", ""]}, "language": "fr"}
    said = {"caption": {"user": "what is it?", "assistant": "a dog"}}
    members = [each for n, one in enumerate((fields, said)) for each in
               ((f"{n}.jpg", picture()), (f"{n}.json", json.dumps(one).encode()))]  # fmt: skip
    shard(0, members=members)
    found = run("img2dataset", folder=folder)
    (sample,) = found.samples["image-short"]
    captions = [(text["text"], text["language"]) for text in sample.content["captions"]]
    assert captions == [("a dog", "en"), ("um cão", "pt")]
    assert found.dropped == {"no caption": 1}


def test_a_caption_that_is_no_utf8_is_dropped_and_half_a_character_too(shard, folder, run, picture):
    captions = [("txt", b"fine"), ("txt", b"Caf\xe9"), ("txt", b" \n"), ("json", b'{"caption": "a \\ud83d dog"}')]
    members = []
    for number, (ending, data) in enumerate(captions):
        members += [(f"{number}.jpg", picture()), (f"{number}.{ending}", data)]
    shard(0, members=members)
    found = run("img2dataset", folder=folder)
    assert [sample.captions for sample in found.samples["image-short"]] == [["fine"]]
    assert found.dropped == {
        "caption that is not UTF-8": 1,
        "no caption": 1,
        "text with half a character (a lone surrogate)": 1,
    }


def test_a_subset_by_uid_takes_what_is_listed(shard, folder, run, tmp_path):
    uids = [f"{number * 7919:016x}{number:016x}" for number in range(6)]
    for number, uid in enumerate(uids):
        shard(number, count=1, uid=uid)
    shard(6, count=1)  # without a uid
    wanted = np.array([(n * 7919, n) for n in (5, 1, 3)] + [(2 * 7919, 99), (2**64 - 1, 2**64 - 1)], dtype="u8,u8")
    np.save(tmp_path / "subset.npy", np.sort(wanted))
    found = run("datacomp", folder=folder, uids=tmp_path / "subset.npy")
    assert [sample.captions for sample in found.samples["image-short"]] == [
        [f"caption {number:05d}0000"] for number in (1, 3, 5)
    ]
    assert found.dropped == {"uid not in the list": 4}


def test_a_list_of_uids_that_is_none_is_refused(shard, folder, run, tmp_path):
    shard(0)
    for number, (array, complaint) in enumerate(
        (
            (np.array([(2, 1), (1, 2)], dtype="u8,u8"), "not sorted"),
            (np.arange(4), "expected one list of uids"),
            (np.array([object()]), "not a .npy file that can be read"),  # would have to be unpickled
        )
    ):
        path = tmp_path / f"{number}.npy"
        np.save(path, array, allow_pickle=True)
        with pytest.raises(UserError, match=complaint):
            run("datacomp", folder=folder, uids=path)


def test_a_folder_without_tars_is_refused(folder, run):
    with pytest.raises(UserError, match="holds no .tar; expected img2dataset's"):
        run("img2dataset", folder=folder)


@pytest.mark.parametrize("name", ["00000.tar", "00000_stats.json"])
def test_a_shard_that_was_edited_is_another_piece(tmp_path, name):
    tarfile.open(tmp_path / "00000.tar", "w").close()
    (tmp_path / "00000_stats.json").write_text("{}")
    before = list(shard_pieces(str(tmp_path)))
    assert list(shard_pieces(str(tmp_path))) == before
    os.utime(tmp_path / name, ns=(1, 1))
    assert list(shard_pieces(str(tmp_path))) != before
