"""Looking at data: tars of others by index, every damage found by validate, a page that stands by itself."""

from __future__ import annotations

import hashlib
import html.parser
import io
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_prep.cli import main
from data_prep.execute.progress import Progress
from data_prep.inspection.summary import summarize
from data_prep.inspection.validate import validate
from data_prep.samples import Text, captions_json, texts_json
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image
from stage_trainer.data.samples import image_of, texts_of


def picture(number: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 30 % 256, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path) -> Callable[..., Path]:
    """Writes image-short data sets: pictures([(image, [Text, …]), …])."""

    def write(samples: list[tuple[bytes, list[Text]]], name: str = "photos") -> Path:
        directory = tmp_path / "data/image-short" / name
        with DatasetWriter(directory, kind="image-short", source=name, samples_per_shard=2) as writer:
            for number, (image, texts) in enumerate(samples):
                content = captions_json(texts, source=name, item=f"{name}/{number}")
                languages = sorted({text.language for text in texts})
                writer.write(f"k{number}", {"png": image, "json": content}, languages=languages, tokens=5 + number)
        return directory

    return write


def caption(text: str = "a cat", language: str = "en") -> list[Text]:
    return [Text(text, language, "name")]


def test_tars_of_others_are_read_as_they_are_once_they_are_indexed(write_tar, tmp_path):
    ours = captions_json(caption("ours"), source="s", item="i")
    tar = write_tar(
        tmp_path / "theirs/a.tar",
        [
            ("./000.jpeg", picture(1)),
            ("./000.txt", b"ein Hund"),
            ("./000.json", b'{"status": "success"}'),
            ("./001.png", picture(2)),
            ("./001.json", ours),
            ("./002.png", picture(3)),
            ("./003.cls", b"7"),
            ("./003.txt", b"no image"),
            ("dir/004.a.png", picture(4)),
            ("dir/004.txt", b"a dot in the key"),
            ("000.jpg", picture(5)),
            ("000.txt", b"another folder's 000"),
            ("../005.jpg", picture()),
            ("../005.txt", b"outside"),
        ],
    )
    write_tar(tmp_path / "theirs/b.tar", [("x.webp", picture(6)), ("x.txt", b"x")])
    before = {path: path.read_bytes() for path in tar.parent.iterdir()}
    command = ["index", str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), "--name", "theirs", "--workers", "1"]
    assert main(command) == 0
    dataset = Dataset.open(tmp_path / "out/image-short/theirs", verify=True)
    found = [(dataset.row(n).key, sorted(dataset.read(n))) for n in range(len(dataset))]
    assert found == [
        ("./000", ["jpeg", "txt"]),
        ("./001", ["json", "png"]),
        ("000", ["jpg", "txt"]),
        ("x", ["txt", "webp"]),
    ]
    assert image_of(dataset.read(0)) == picture(1)
    assert texts_of(dataset, 0, dataset.read(0))["captions"][0]["text"] == "ein Hund"
    assert texts_of(dataset, 1, dataset.read(1))["captions"][0]["text"] == "ours"
    receipt = json.loads((tmp_path / "out/image-short/theirs/receipt.json").read_text())
    assert receipt["dropped"] == {
        "a name that leads out of the tar": 2,
        "no caption (.txt, or .json with captions)": 1,
        "no image": 2,
    }
    assert {path: path.read_bytes() for path in tar.parent.iterdir()} == before
    assert (tmp_path / "out/image-short/theirs/00000-0000.tar").is_symlink()


def test_large_letters_jpeg_and_odd_names_of_others_are_no_fault(write_tar, tmp_path):
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "JPEG")
    members = [
        (f"{key}.{ending}", buffer.getvalue()) for key, ending in (("a", "JPG"), ("b", "jpeg"), ("c\udcff", "jpg"))
    ]
    members += [("d/e.JPEG", picture()), ("d/e.TXT", b"x")]
    members[1:1], members[3:3], members[5:5] = [("a.txt", b"x")], [("b.txt", b"y")], [("c\udcff.txt", b"z")]
    tar = write_tar(tmp_path / "theirs.tar", members)
    assert main(["index", str(tar), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    folder = tmp_path / "out/image-short/indexed"
    receipt = json.loads((folder / "receipt.json").read_bytes())
    assert receipt["dropped"] == {"name that is not UTF-8": 1}
    assert receipt["examples"] == {"name that is not UTF-8": ["theirs.tar: c\\udcff"]}
    assert [Dataset.open(folder).row(number).key for number in range(3)] == ["a", "b", "d/e"]
    assert list(validate(folder)) == []


def test_a_cut_tar_is_indexed_up_to_the_cut(write_tar, tmp_path):
    members = [(f"{n}.{end}", data) for n in range(4) for end, data in (("png", picture(n)), ("txt", b"t"))]
    tar = write_tar(tmp_path / "a.tar", members)
    tar.write_bytes(tar.read_bytes()[: 5 * 1024])
    assert main(["index", str(tar), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    dataset = Dataset.open(tmp_path / "out/image-short/indexed", verify=True)
    assert 1 <= len(dataset) < 4
    assert [list(dataset.read(n)) for n in range(len(dataset))] == [["png", "txt"]] * len(dataset)


def test_text_triplets_of_others_need_all_their_parts(write_tar, tmp_path):
    texts = [Text("t", "de", "body")]
    whole = texts_json(texts, texts, [texts] * 7, source="s", item="i")
    tar = write_tar(tmp_path / "a.tar", [("a.json", whole), ("b.json", texts_json(texts, texts, source="s", item="i"))])
    command = ["index", str(tar), "--out", str(tmp_path / "out"), "--kind", "text-triplets", "--workers", "1"]
    assert main(command) == 0
    dataset = Dataset.open(tmp_path / "out/text-triplets/indexed")
    assert [(dataset.row(n).key, dataset.row(n).languages) for n in range(len(dataset))] == [("a", ("de",))]


def test_a_sound_data_set_passes_with_any_number_of_processes(pictures, capsys):
    directory = pictures([(picture(n), caption()) for n in range(5)])
    for workers in ("1", "2"):
        assert main(["validate", str(directory.parents[1]), "--workers", workers]) == 0
        assert "5 samples, all sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "content", "languages", "complaint"),
    [
        (picture()[:70], captions_json(caption(), source="s", item="i"), ["en"], "its .png cannot be decoded"),
        (picture(), b"{cut", ["en"], "its .json is not JSON"),
        (picture(), b'{"captions": []}', ["en"], "its .json has no captions"),
        (picture(), b'{"captions": [{"text": "x"}]}', ["en"], "lacks language"),
        (
            picture(),
            captions_json(caption(), source="s", item="i"),
            ["de"],
            "its texts are in ['en'], the sidecar says ['de']",
        ),
    ],
)
def test_each_fault_of_a_sample_is_named(tmp_path, image, content, languages, complaint, capsys):
    directory = tmp_path / "d"
    with DatasetWriter(directory, kind="image-short", source="s") as writer:
        writer.write(
            "good",
            {"png": picture(), "json": captions_json(caption(), source="s", item="i")},
            languages=["en"],
            tokens=None,
        )
        writer.write("bad", {"png": image, "json": content}, languages=languages, tokens=None)
    (problem,) = validate(directory)
    assert complaint in problem.what
    assert "'bad'" in problem.where
    assert main(["validate", str(directory), "--workers", "1"]) == 1
    assert "1 problems" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_after_writing_is_found_in_every_file_and_the_rest_is_still_checked(pictures, workers):
    directory = pictures([*((picture(n), caption()) for n in range(5)), (b"no picture", caption())])
    for name in ("00000.index.npy", "00001.tar"):
        path = directory / name
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[600 if name.endswith("tar") else 9] ^= 1
        path.write_bytes(data)
    checked = []
    problems = list(validate(directory, workers=workers, tick=checked.append))
    assert [problem.where for problem in problems] == ["00000.index.npy", "00001.tar", "00002.tar, sample 'k5'"]
    assert "checksum differs" in problems[0].what
    assert checked == [2, 2, 2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_progress_is_erased_before_other_output():
    progress = Progress(1, stream=(shown := Terminal()))
    progress.add(5)
    progress.finish()
    progress.clear()
    assert re.search(r"\r\[#+\] 100% 1 of 1 units, 5 samples, .*\n\r {60,}\r$", shown.getvalue())


def test_validate_and_inspect_say_how_far_they_are(pictures, tmp_path, monkeypatch, capsys):
    pictures([(picture(n), caption()) for n in range(5)], "one")
    pictures([(picture(n), caption()) for n in range(3)], "two")
    (tmp_path / "data/image-short/two/00001.tar").unlink()
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    assert main(["validate", str(tmp_path / "data"), "--workers", "1"]) == 1
    assert "100% 3 of 3 units, 5 samples" in shown.getvalue()
    assert "\x1b" not in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    command = ["inspect", str(tmp_path / "data/image-short/one"), "--out", str(tmp_path / "look.html")]
    assert main([*command, "--look-at", "2"]) == 0
    assert "100% 7 of 7 units" in shown.getvalue()  # five lines of sidecars, two samples


def test_keys_name_samples_within_a_tar_and_a_sidecar_that_points_elsewhere_is_found(write_tar, tmp_path):
    for name in ("a", "b"):  # the same key in two tars
        write_tar(tmp_path / f"theirs/{name}.tar", [("k.png", picture()), ("k.txt", name.encode())])
    assert main(["index", str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    folder = tmp_path / "out/image-short/indexed"
    assert list(validate(folder)) == []
    dataset = Dataset.open(folder)
    assert len({texts_of(dataset, number, dataset.read(number))["item"] for number in range(2)}) == 2
    sidecar, manifest = folder / "00001-0000.index.npy", folder / "manifest.json"
    table, parsed = np.load(sidecar), json.loads(manifest.read_text())
    table = np.concatenate([table, table])
    table["png"][0, 0] += 1
    np.save(sidecar, table)
    twice = sidecar.read_bytes()
    parsed["samples"], parsed["shards"][1]["samples"] = 3, 2
    parsed["shards"][1] |= {"index_bytes": len(twice), "index_sha256": hashlib.sha256(twice).hexdigest()}
    manifest.write_text(json.dumps(parsed))
    assert [problem.what for problem in validate(folder)] == [
        "the tar has no member k.png where the sidecar says",
        f"{folder / '00001-0000.tar'}: sample 'k' is damaged (its bytes differ from the sidecar's hash)",
        "its key occurs twice in the shard",
    ]


class Page(html.parser.HTMLParser):
    """Collects text, and every address that the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.addresses, self.tags = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_by_itself_and_shows_what_is_there(pictures, tmp_path):
    directory = pictures(
        [
            (picture(1), caption("a cat <script>alert(1)</script>")),
            (picture(1), caption("ein Hund", "de")),
            (picture(2, (200, 50)), [*caption("قطة", "ar"), *caption("two")]),
            (picture(2, (200, 50)), [*caption("قطة", "ar"), *caption("two")]),
        ]
    )
    receipt = {"dropped": {"broken image": 17}, "examples": {"broken image": ["a.csv, row 3"]}}
    (directory / "receipt.json").write_text(json.dumps(receipt))
    assert main(["inspect", str(tmp_path / "data"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for other in (
        b"",
        b"[1]",
        b"\xff",
        b'{"dropped": 1}',
        b'{"dropped": {"a": "b"}}',
        b'{"dropped": {"a": 1}, "examples": {"a": [1]}}',
        b"[" * 99_999,
    ):
        (directory / "receipt.json").write_bytes(other)
        assert main(["inspect", str(tmp_path / "data"), "--out", str(tmp_path / "other.html")]) == 2
    page = Page(text)
    for shown in ("image-short/photos", "قطة", "ein Hund", "broken image", "17", "a.csv, row 3", "200 × 50: 2"):
        assert shown in page.text
    assert "<script>alert" not in text
    assert "script" not in page.tags
    assert all(address.startswith(("#", "data:image/jpeg;base64,")) for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.tags.count("img") >= 4


def test_counts_are_exact_and_duplicates_are_found(pictures):
    same = (picture(2), caption("twice"))
    found = summarize(pictures([same, same, (picture(3), caption("einmal", "de"))]), look_at=100, examples=1)
    assert found.by_language == {"en": 2, "de": 1}
    assert (found.samples, found.sampled, found.shards) == (3, 3, 2)
    assert (found.same_samples, found.same_images, found.same_texts) == (0, 1, 1)  # items differ, so samples do
    assert found.tokens == [5, 6, 7]
    assert {language: len(examples) for language, examples in found.examples.items()} == {"en": 1, "de": 1}


def test_a_bomb_is_counted_and_the_rest_is_looked_at(pictures):
    bomb = bytearray(picture())
    bomb[16:24] = (60_000).to_bytes(4) * 2  # width and height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    found = summarize(pictures([(bytes(bomb), caption()), (picture(), caption())]), look_at=9, examples=1)
    assert found.sampled == 1
    assert "decompression bomb" in found.unreadable[0]


def test_many_samples_are_looked_at_evenly(pictures):
    directory = pictures([(picture(n), caption(f"text {n}")) for n in range(20)])
    found = summarize(directory, look_at=5, examples=9)
    assert [example.key for example in found.examples["en"]] == ["k0", "k4", "k8", "k12", "k16"]


def test_text_triplets_have_a_page_too(tmp_path):
    texts = [Text("t", "de", "body")]
    with DatasetWriter(tmp_path / "d", kind="text-triplets", source="s") as writer:
        content = texts_json(texts, texts, [texts] * 7, source="s", item="i")
        writer.write("a", {"json": content}, languages=["de"], tokens=None)
    assert main(["inspect", str(tmp_path / "d"), "--out", str(tmp_path / "p.html")]) == 0
    assert "negative 7" in Page((tmp_path / "p.html").read_text()).text


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_where_there_is_no_data_set_one_line_says_so(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    assert "holds no data set" in capsys.readouterr().err
