"""What `data-prep index` says of other people's tars."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.inspection.validate import validate
from data_prep.shards import Dataset
from PIL import Image
from stage_trainer.data.samples import texts_of


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_receipt_and_the_table_say_how_many_went_out(tmp_path, capsys, workers):
    """Samples, not members or shards: of three tars with 5, 1 and 0 of use."""
    for number, (good, bad) in enumerate([(5, 2), (1, 0), (0, 3)]):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for sample in range(good + bad):
                for ending, data in (("png", picture(sample)), *([("txt", b"a caption")] if sample < good else [])):
                    info = tarfile.TarInfo(f"{number}-{sample}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    tars = [str(tmp_path / f"{number}.tar") for number in range(3)]
    assert main(["index", *tars, "--out", str(tmp_path / "out"), "--workers", str(workers)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["came", "in", "11"] in table
    assert ["image-short", "6"] in table
    folder = tmp_path / "out/image-short/indexed"
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["came_in"] == 11
    assert receipt["went_out"] == {"image-short": 6}
    assert sum(receipt["dropped"].values()) == 5
    dataset = Dataset.open(folder)
    assert (len(dataset), list(dataset.shard_sizes)) == (6, [5, 1])


def index(tmp_path: Path, *options: str) -> tuple[Dataset, dict]:
    """The data set that `index` makes of tmp_path/theirs, which `validate` finds sound, and the receipt."""
    command = ["index", str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), "--workers", "1", *options]
    assert main(command) == 0
    (folder,) = (tmp_path / "out").glob("*/indexed")
    assert list(validate(folder)) == []
    return Dataset.open(folder, verify=True), json.loads((folder / "receipt.json").read_text())


def test_an_index_of_an_earlier_release_is_the_same_job(write_tar, tmp_path, capsys):
    """It cuts nothing, so the default size of shards, which was 1,000 then, is no part of it."""
    write_tar(tmp_path / "theirs/a.tar", [("0.png", picture(0)), ("0.txt", b"zero")])
    receipt = index(tmp_path)[1]
    assert receipt["job"]["samples_per_shard"] == 1000
    index(tmp_path)
    assert "nothing to do" in capsys.readouterr().out


def captions_of(dataset: Dataset) -> dict[str, list[str]]:
    """The captions of each sample, by key, as training reads them."""
    found = {}
    for number in range(len(dataset)):
        texts = texts_of(dataset, number, dataset.read(number))["captions"]
        found[dataset.row(number).key] = [text["text"] for text in texts]
    return found


def test_what_macos_leaves_in_tars_and_folders_is_passed_over_and_counted(write_tar, tmp_path):
    apple = bytes.fromhex("00051607000200004d6163204f53205820202020") + bytes(100)
    members = [("./._0.jpg", apple), ("./0.jpg", picture(0)), ("./._0.txt", apple), ("./0.txt", b"zero")]
    members += [("__MACOSX/1.jpg", apple), (".DS_Store", apple), ("d/.DS_Store", apple), ("1.png", picture(1))]
    members += [("._1.txt", apple), ("1.txt", b"one")]
    write_tar(tmp_path / "theirs/a.tar", members)
    (tmp_path / "theirs/._a.tar").write_bytes(apple)
    dataset, receipt = index(tmp_path)
    assert captions_of(dataset) == {"./0": ["zero"], "1": ["one"]}
    assert (receipt["came_in"], receipt["dropped"]) == (2, {})
    assert receipt["notes"] == {"hidden members passed over (._NAME, .DS_Store, __MACOSX)": 6}


def test_members_of_a_sample_may_stand_apart_but_two_samples_of_one_name_are_never_mixed(write_tar, tmp_path):
    members = [("b.txt", b"b"), ("a.png", picture(0)), ("c.png", picture(2)), ("b.png", picture(1)), ("a.txt", b"a")]
    members += [("c.jpg", picture(3)), ("c.txt", b"of the other picture"), ("b.png", picture(4)), ("b.json", b"{}")]
    write_tar(tmp_path / "theirs/a.tar", members)
    dataset, receipt = index(tmp_path)
    assert captions_of(dataset) == {"b": ["b"], "a": ["a"]}
    assert [dataset.read(number)["png"] for number in range(2)] == [picture(1), picture(0)]
    assert receipt["dropped"] == {"no caption (.txt, or .json with captions)": 1, "second sample of one name": 2}


def test_names_with_dots_are_samples_of_their_own_where_they_are_whole(write_tar, tmp_path):
    members = [("IMG_2020.01.A.JPG", picture(0)), ("IMG_2020.01.A.txt", b"first"), ("IMG_2020.02.jpg", picture(1))]
    members += [("IMG_2020.02.txt", b"second"), ("a.jpg", picture(2)), ("a.txt", b"plain"), ("a.v2.jpg", picture(3))]
    members += [("a.v2.txt", b"version 2"), ("s.jpg", picture(4)), ("s.seg.png", picture(5)), ("s.txt", b"street")]
    write_tar(tmp_path / "theirs/a.tar", members)
    dataset, receipt = index(tmp_path)
    assert captions_of(dataset) == {
        "IMG_2020.01.A": ["first"],
        "IMG_2020.02": ["second"],
        "a": ["plain"],
        "a.v2": ["version 2"],
        "s": ["street"],
    }
    assert receipt["dropped"] == {}
    assert receipt["notes"] == {"further images and texts of a sample, not read": 1}


def test_what_training_would_replace_is_refused_by_its_reason(write_tar, tmp_path):
    whole, gif = picture(0), io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "GIF")
    samples = {
        "good": (whole, b"a dog"),
        "blank": (whole, b" \n"),
        "latin": (whole, b"Caf\xe9"),
        "wide": (whole, "Brücke".encode("utf-16")),
        "marked": (whole, b"\xef\xbb\xbfa mark before it"),
        "cut": (whole[:45], b"x"),
        "none": (b"", b"x"),
        "page": (b"<html>404</html>", b"x"),
        "gif": (gif.getvalue(), b"x"),
    }
    members = []
    for key, (image, text) in samples.items():
        members += [(f"{key}.png", image), (f"{key}.txt", text)]
    half = {"captions": [{"text": "a \ud83d dog", "language": "en"}]}
    members += [("half.png", whole), ("half.json", json.dumps(half).encode())]
    write_tar(tmp_path / "theirs/a.tar", members)
    dataset, receipt = index(tmp_path)
    assert captions_of(dataset) == {"good": ["a dog"], "marked": ["a mark before it"]}
    assert receipt["dropped"] == {
        "broken image": 1,
        "caption that is not UTF-8": 2,
        "empty image file": 1,
        "no caption: its .txt is empty": 1,
        "not a JPEG, PNG or WebP image": 2,
        "text of a text of its captions has half a character": 1,
    }
    assert main(["inspect", str(dataset.directory), "--out", str(tmp_path / "look.html")]) == 0
    assert main(["index", str(tmp_path / "theirs"), "--out", str(tmp_path / "small"), "--max-pixels", "63"]) == 2


def test_captions_in_a_field_of_any_name_reach_training_and_curation(write_tar, tmp_path):
    fields = [{"alt": "one", "meta": [{"text": "two"}, {"text": ["three", "one"]}]}, {"other": "x"}, {"alt": "\udc00"}]
    members = [(f"d.x/{n}.png", picture(n)) for n in range(3)]
    members += [(f"d.x/{n}.json", json.dumps(one).encode()) for n, one in enumerate(fields)]
    members.append(("d.x/1.txt", b"not asked for"))
    write_tar(tmp_path / "theirs/a.tar", members)
    dataset, receipt = index(tmp_path, "--caption-key", "alt,meta.text")
    assert captions_of(dataset) == {"d.x/0": ["one", "two", "three"]}
    assert receipt["dropped"] == {
        "its .json has no captions": 1,
        "text of a text of its captions has half a character": 1,
    }
    clean = ["dedup", str(dataset.directory), "--out", str(tmp_path / "clean"), "--name", "c", "--workers", "1"]
    assert main(clean) == 0  # its keys are paths, under which we write nothing
    (copy,) = (tmp_path / "clean").glob("*/*/manifest.json")
    assert list(captions_of(Dataset.open(copy.parent)).values()) == [["one", "two", "three"]]


def test_tars_that_cannot_be_read_by_offsets_say_why(write_tar, tmp_path):
    good = write_tar(tmp_path / "theirs/a.tar", [("a.png", picture(0)), ("a.txt", b"a")])
    (tmp_path / "theirs/b.tar").write_bytes(gzip.compress(good.read_bytes()))
    with tarfile.open(tmp_path / "theirs/c.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        data = b"1\n0\n8\n".ljust(512, b"\0") + picture(1)
        info = tarfile.TarInfo("c.png")
        info.size = len(data)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9000"}
        tar.addfile(info, io.BytesIO(data))
    dataset, receipt = index(tmp_path)
    assert list(captions_of(dataset)) == ["a"]
    assert receipt["dropped"] == {
        "a member stored with holes (tar --sparse)": 1,
        "a packed tar, which has no offsets: unpack it": 1,
    }


def test_a_field_of_captions_is_refused_where_there_are_none(write_tar, tmp_path, capsys):
    write_tar(tmp_path / "theirs/a.tar", [("a.json", b"{}")])
    command = ["index", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert main([*command, "--kind", "text-pairs", "--caption-key", "alt"]) == 2
    assert "text-pairs has no captions" in capsys.readouterr().err
    assert main([*command, "--caption-key", "alt,"]) == 2
    assert "expected names of fields" in capsys.readouterr().err


def test_tars_joined_by_cat_and_second_names_of_a_file_are_read_whole(write_tar, tmp_path):
    """What stands behind the end of the first tar was lost without a word."""
    first = write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.txt", b"a")])
    second = write_tar(tmp_path / "b.tar", [("b.png", picture(1)), ("b.txt", b"b"), ("a.txt", b"another a")])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/joined.tar").write_bytes(first.read_bytes() + second.read_bytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "c.png").write_bytes(picture(2))
    (folder / "c.txt").write_bytes(b"c")
    (folder / "d.png").hardlink_to(folder / "c.png")
    (folder / "d.txt").write_bytes(b"d")
    (folder / "e.png").symlink_to("c.png")
    with tarfile.open(tmp_path / "theirs/linked.tar", "w") as tar:
        for name in ("c.png", "c.txt", "d.png", "d.txt", "e.png"):
            tar.add(folder / name, name)
    dataset, receipt = index(tmp_path)
    assert captions_of(dataset) == {"a": ["a"], "b": ["b"], "c": ["c"], "d": ["d"]}
    assert [dataset.read(number)["png"] for number in range(4)] == [picture(0), picture(1), picture(2), picture(2)]
    assert receipt["dropped"] == {"a link or device in a tar": 1, "second sample of one name": 1}


@pytest.mark.parametrize("left", ["half of the last member", "no end"])
def test_an_index_of_a_tar_that_is_cut_short_is_sound(write_tar, tmp_path, left):
    members = [member for n in range(3) for member in ((f"{n}.png", picture(n)), (f"{n}.txt", b"a caption"))]
    tar = write_tar(tmp_path / "theirs/a.tar", members)
    end = tar.read_bytes().rindex(b"a caption")
    tar.write_bytes(tar.read_bytes()[: end + (4 if left == "half of the last member" else 9)])
    dataset, receipt = index(tmp_path)
    assert len(dataset) == (2 if left == "half of the last member" else 3)
    assert receipt["dropped"]["rest of a tar that is cut short or damaged"] == 1


def test_utf_16_without_a_mark_and_what_nobody_can_see_are_no_captions(write_tar, tmp_path):
    texts = {
        "utf16": "Brücke".encode("utf-16-le"),
        "ascii16": "bridge".encode("utf-16-be"),
        "padded": b"a bridge\0\0\0",
        "widthless": "\u200b\ufeff\u2060".encode(),
        "flag": "🏴".encode(),
    }
    members = [each for key, text in texts.items() for each in ((f"{key}.png", picture(0)), (f"{key}.txt", text))]
    blank = {"captions": [{"text": "\u200d", "language": "en"}]}
    members += [("json.png", picture(0)), ("json.json", json.dumps(blank).encode())]
    write_tar(tmp_path / "theirs/a.tar", members)
    dataset, receipt = index(tmp_path)
    assert captions_of(dataset) == {"flag": ["🏴"]}
    assert receipt["dropped"] == {
        "a text of its captions lacks text": 1,
        "caption that is not UTF-8": 1,
        "caption with a NUL, as padding has, or UTF-16 that is taken for UTF-8": 2,
        "no caption: its .txt is empty": 1,
    }


def test_a_file_that_is_no_tar_is_called_what_it_is(write_tar, tmp_path):
    write_tar(tmp_path / "theirs/a.tar", [("a.png", picture(0)), ("a.txt", b"a")])
    for name, data in {"b": b"", "c": b"<html>404</html>" * 100, "d": b"PK\3\4" + bytes(600)}.items():
        (tmp_path / f"theirs/{name}.tar").write_bytes(data)
    assert index(tmp_path)[1]["dropped"] == {
        "a file that is no tar": 1,
        "a packed tar, which has no offsets: unpack it": 1,
        "an empty file in place of a tar": 1,
    }


def test_captions_by_language_in_a_field_keep_their_languages(write_tar, tmp_path):
    fields = {"alt": {"en": "a dog", "pt-BR": ["um cão", "o cão"]}, "turns": {"user": "what?", "model": "a dog"}}
    fields["meta"] = {"id": "12", "by": "Jo"}
    write_tar(tmp_path / "theirs/a.tar", [("a.png", picture(0)), ("a.json", json.dumps(fields).encode())])
    dataset, _ = index(tmp_path, "--caption-key", "alt,turns,meta")
    assert captions_of(dataset) == {"a": ["a dog", "um cão", "o cão"]}
    assert dataset.row(0).languages == ("en", "pt")
