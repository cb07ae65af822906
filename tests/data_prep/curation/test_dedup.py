"""Deduplication: nothing goes that is only a little like what stays, no caption is lost, and all that goes is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.curation import passes
from data_prep.curation.phash import perceptual_hash
from data_prep.curation.text_duplicates import TELLING, information
from data_prep.shards import Dataset
from PIL import Image, ImageDraw

from .conftest import contents, encoded, files, keys, photo, text

LONG = "the old lighthouse keeper counts seventeen white boats on the grey sea while evening falls over the cliffs"


def dedup(*arguments: object, expected: int = 0) -> None:
    assert main(["dedup", *(str(argument) for argument in arguments), "--workers", "1"]) == expected


def receipt(folder: Path) -> dict:
    return json.loads((folder / "receipt.json").read_text())


def square(colour: str) -> Image.Image:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).rectangle((20, 16, 70, 66), fill=colour)
    return image


def test_pictures_that_differ_in_colour_alone_stay(write_images, tmp_path):
    colours = [square(colour) for colour in ("red", "green", "blue", "orange")]
    assert len({perceptual_hash(image) for image in colours}) < 4, "the hash alone does not tell them apart"
    again = encoded(Image.open(io.BytesIO(encoded(colours[2], "JPEG", quality=90))).resize((120, 120)))
    shards = write_images("a", [(data, [text("x")]) for data in [*map(encoded, colours), again]])
    dedup(shards, "--out", tmp_path / "out", "--name", "n")
    assert keys(tmp_path / "out/image-short/n") == ["a-0", "a-1", "a-2", "a-3"]
    (example,) = receipt(tmp_path / "out/image-short/n")["examples"]["nearly the same as an earlier one"]
    assert example == f"{shards}: a-4, like {shards}: a-2"


def test_the_first_of_the_same_pictures_takes_over_the_captions_of_the_others(write_images, tmp_path):
    data, near = encoded(photo(1)), encoded(Image.open(io.BytesIO(encoded(photo(1), "JPEG", quality=80))))
    one = write_images("a", [(data, [text("a dog", "en")]), (encoded(photo(2)), [text("a cat", "en")])])
    two = write_images(
        "b", [(data, [text("ein Hund", "de"), text("a dog", "en")]), (near, [text("a hound", "en"), text("犬", "ja")])]
    )
    dedup(one, two, "--out", tmp_path / "out", "--name", "n")
    folder = tmp_path / "out/image-short/n"
    found = [[(c["language"], c["text"]) for c in sample["captions"]] for sample in contents(folder)]
    assert found == [[("en", "a dog"), ("de", "ein Hund"), ("en", "a hound"), ("ja", "犬")], [("en", "a cat")]]
    assert Dataset.open(folder).row(0).languages == ("de", "en", "ja")
    assert receipt(folder)["notes"]["captions that the first of the same images took over"] == 3
    dedup(one, two, "--out", tmp_path / "alone", "--name", "n", "--samples-per-shard", 1000)
    assert contents(tmp_path / "alone/image-short/n") == contents(folder)


def test_a_copy_of_what_falls_shares_its_fate(write_images, tmp_path):
    """Copies of one that nearly is an earlier picture, or one of an evaluation set."""
    near = [encoded(Image.open(io.BytesIO(encoded(photo(n), "JPEG", quality=80)))) for n in (1, 3)]
    shards = write_images(
        "a", [(data, [text(f"{n}")]) for n, data in enumerate([encoded(photo(1)), near[0], near[0], near[1], near[1]])]
    )
    test = write_images("test", [(encoded(photo(3)), [text("x")])])
    dedup(shards, "--against", test, "--out", tmp_path / "out", "--name", "n")
    (sample,) = contents(tmp_path / "out/image-short/n")
    assert [caption["text"] for caption in sample["captions"]] == ["0", "1", "2"]
    dropped = receipt(tmp_path / "out/image-short/n")["dropped"]
    assert dropped == {
        "nearly the same as an earlier one": 1, "the same as an earlier one": 1, "in an evaluation set": 2
    }  # fmt: skip


def test_a_leak_does_not_take_its_twin_along(write_pairs, tmp_path):
    """The second is like the first, which is like the evaluation set's; the second itself is not like that one."""
    words = LONG.split()
    asked, leak, twin = " ".join(words), " ".join([*words[:-2], "a"]), " ".join([*words[3:-2], "a"])
    shards = write_pairs("p", [("q", leak), ("q", twin), ("q", "something else altogether, of which nobody asks")])
    test = write_pairs("test", [(asked, "x")])
    dedup(shards, "--against", test, "--out", tmp_path / "out", "--name", "n")
    assert keys(tmp_path / "out/text-pairs/n") == ["p-1", "p-2"]
    (example,) = receipt(tmp_path / "out/text-pairs/n")["examples"]["in an evaluation set"]
    assert example == f"{shards}: p-0, like {test}: test-0"


@pytest.mark.parametrize(
    ("asked", "other"),
    [
        ("Where is the old town hall of Bern?", "When was the bridge of Basel built?"),
        ("北京大学的图书馆在什么地方？", "上海最高的建筑叫什么名字？"),
        ("東京で一番古いお寺はどこにありますか。", "京都の名物は何でしょうか、教えて。"),
        ("서울에서 가장 오래된 궁궐은 어디입니까?", "부산에서 가장 큰 시장은 무엇입니까?"),
        ("أين تقع أقدم مكتبة في مدينة القاهرة؟", "متى بني الجسر الكبير في المدينة؟"),
    ],
)
def test_a_question_of_an_evaluation_set_is_found_in_any_script(write_pairs, tmp_path, asked, other):
    shards = write_pairs("p", [(asked, "x"), (other, "y"), ("犬", "dog")])
    test = write_pairs("test", [(asked, "z"), ("犬", "dog")])
    dedup(shards, "--against", test, "--out", tmp_path / "out", "--name", "n")
    assert keys(tmp_path / "out/text-pairs/n") == ["p-1", "p-2"], "a word alone is in both by chance"
    short = receipt(tmp_path / "out/text-pairs/n")["notes"]
    assert short == {}


def test_what_a_text_says_is_counted_in_letters_of_an_alphabet():
    assert information("a small cat") == 11
    assert information("猫") == 3
    assert information("고양이") == 6
    assert information("ねこ") == 3
    assert information("北京大学的图书馆在") >= TELLING


def test_an_array_task_that_is_late_finds_the_result_and_says_so(write_images, tmp_path, capsys, monkeypatch):
    shards = write_images("a", [(encoded(photo(seed % 3)), [text("x")]) for seed in range(5)])
    command = [shards, "--out", tmp_path / "out", "--name", "n"]
    dedup(*command, "--task", "0/3")
    assert "other array tasks have units left; when all are done, run the array again" in capsys.readouterr().out
    dedup(*command, "--task", "1/3")
    real = passes.save

    def publish_first(path, **arrays):  # another task, while this one decides
        monkeypatch.setattr(passes, "save", real)
        dedup(*command)
        real(path, **arrays)

    monkeypatch.setattr(passes, "save", publish_first)
    dedup(*command, "--task", "2/3")
    assert "nothing to do" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image-short"]


def test_a_dry_run_shows_what_would_go_and_the_next_run_goes_on_with_its_survey(write_images, tmp_path, capsys):
    shards = write_images("a", [(encoded(photo(seed % 3)), [text("x")]) for seed in range(5)])
    command = [shards, "--out", tmp_path / "out", "--name", "n"]
    dedup(*command, "--dry-run")
    said = capsys.readouterr().out
    assert "the same as an earlier one: 2\n" in said
    assert f"  {shards}: a-3\n    like {shards}: a-0\n" in said
    assert "3 of 5 would stay; run again without --dry-run" in said
    assert [path.name.partition(".survey")[0] for path in (tmp_path / "out").iterdir()] == ["n"]
    dedup(*command)
    assert "surveying, 2 of 2 units are done" in capsys.readouterr().out
    (tmp_path / "out").rename(tmp_path / "first")
    dedup(*command)
    assert files(tmp_path / "out") == files(tmp_path / "first")
