"""Deduplication: nothing goes that is only a little like what stays, no caption is lost, and all that goes is named."""

from __future__ import annotations

import io
import json

import pytest
from data_prep.cli import main
from data_prep.curation import passes
from data_prep.curation.phash import perceptual_hash
from data_prep.curation.text_duplicates import TELLING, information
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image, ImageDraw, ImageFont

from .conftest import contents, encoded, files, keys, photo, receipt, run, text

LONG = "the old lighthouse keeper counts seventeen white boats on the grey sea while evening falls over the cliffs"


def dedup(*arguments: object, expected: int = 0) -> None:
    assert main(["dedup", *(str(argument) for argument in arguments), "--workers", "1"]) == expected


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


def labelled(words: str) -> Image.Image:
    image = Image.new("RGB", (384, 384), (200, 220, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 40, 344, 344), fill=(90, 140, 60))
    draw.text((192, 300), words, font=ImageFont.load_default(28), fill="white", anchor="mm")
    return image


def test_pictures_that_differ_in_a_word_alone_stay_and_their_copies_go(write_images, tmp_path):
    """A copy of 16 x 16 does not show the word; what goes is compared by pixels first."""
    signs = [labelled(words) for words in ("Exit 1", "Exit 7", "Room 303", "Room 308")]
    worse = [
        encoded(signs[0], "JPEG", quality=40),
        encoded(signs[1].resize((288, 288))),
        encoded(signs[2].resize((192, 192), Image.Resampling.BILINEAR), "JPEG", quality=60),
        encoded(signs[3].resize((500, 500)), "JPEG", quality=75),
    ]
    shards = write_images("a", [(data, [text("x")]) for data in [*map(encoded, signs), *worse]])
    dedup(shards, "--out", tmp_path / "out", "--name", "n")
    assert keys(tmp_path / "out/image-short/n") == ["a-0", "a-1", "a-2", "a-3"]
    found = receipt(tmp_path / "out/image-short/n")["examples"]["nearly the same as an earlier one"]
    assert found == [f"{shards}: a-{n + 4}, like {shards}: a-{n}" for n in range(4)][: len(found)]


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


def test_duplicate_images_go_and_the_first_of_each_stays(write_images, tmp_path):
    photos = [encoded(photo(seed)) for seed in range(6)]
    jpeg = encoded(Image.open(io.BytesIO(encoded(photo(1), "JPEG", quality=60))))
    flat = [encoded(Image.new("RGB", (9, 9), colour)) for colour in ("red", "blue")]
    shards = write_images(
        "a", [(data, [text("x")]) for data in [*photos[:3], photos[0], jpeg, *flat, photos[5], photos[4][:90]]]
    )
    test = write_images("test", [(encoded(photo(5).resize((80, 80))), [text("x")])])
    out = tmp_path / "out"
    run("dedup", shards, "--out", out, "--name", "clean", "--against", test, "--workers", 1)
    assert keys(out / "image-short/clean") == ["a-0", "a-1", "a-2", "a-5", "a-6"]
    assert receipt(out / "image-short/clean")["dropped"] == {
        "an image that cannot be decoded": 1,
        "in an evaluation set": 1,
        "nearly the same as an earlier one": 1,
        "the same as an earlier one": 1,
    }
    assert [path.name for path in out.iterdir()] == ["image-short"]
    run("dedup", shards, "--out", out, "--name", "exact", "--exact", "--workers", 1)
    assert keys(out / "image-short/exact") == ["a-0", "a-1", "a-2", "a-4", "a-5", "a-6", "a-7"]


def test_duplicate_texts_go_and_what_an_evaluation_set_asks_too(write_pairs, tmp_path):
    pairs = [
        ("what is a lighthouse", LONG),
        ("a cat", "an animal that sleeps all day and hunts at night when the house is quiet"),
        ("what is a lighthouse", LONG),
        ("What is a lighthouse?", LONG.replace("seventeen", "seventeen") + "!"),
        ("what is a lighthouse", "a tower with a lamp at its top that warns ships of rocks and sand banks at night"),
        ("where do whales sleep when the winter comes to the northern seas", "in the warm bays far to the south"),
    ]
    shards = write_pairs("p", pairs)
    test = write_pairs(
        "test", [("Where do whales sleep when the winter comes to the northern seas?", "x"), ("a cat", "y")]
    )
    out = tmp_path / "out"
    run("dedup", shards, "--out", out, "--name", "clean", "--against", test, "--workers", 1)
    assert keys(out / "text-pairs/clean") == ["p-0", "p-1", "p-4"]
    dropped = receipt(out / "text-pairs/clean")["dropped"]
    assert dropped == {
        "in an evaluation set": 1, "nearly the same as an earlier one": 1, "the same as an earlier one": 1,
    }  # fmt: skip
    # What stays, stays as it is.
    before, after = Dataset.open(shards), Dataset.open(out / "text-pairs/clean")
    assert after.read(2) == before.read(4)
    assert after.row(2).tokens == 7


def jaccard(one: str, two: str) -> float:
    sets = [{line[place : place + 5] for place in range(len(line) - 4)} for line in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ((), ["p-0", "p-2"]),
        (("--similarity", 0.6), ["p-0"]),
        (("--similarity", 0.97), ["p-0", "p-1", "p-2"]),
        (("--exact",), ["p-0", "p-1", "p-2"]),
    ],
)
def test_how_alike_texts_may_be_is_what_similarity_says(write_pairs, tmp_path, options, stay):
    """The second is to the first as 0.9, the third as 0.7, by exact Jaccard similarity of runs of five."""
    words = LONG + " and a dog barks at the rising moon from the garden wall of the last house in the village"
    texts = [
        words,
        words.replace("seventeen white", "seventeen grey"),
        words.replace("rising moon from the garden wall of the", "x"),
    ]
    lines = [f"a question {one}" for one in texts]
    assert 0.85 < jaccard(lines[0], lines[1]) < 0.95
    assert 0.65 < jaccard(lines[0], lines[2]) < 0.77
    shards = write_pairs("p", [("a question", one) for one in texts])
    run("dedup", shards, "--out", tmp_path / "out", "--name", "n", "--workers", 1, *options)
    assert keys(tmp_path / "out/text-pairs/n") == stay


@pytest.mark.parametrize(("similarity", "stay"), [(0.8, ["p-1"]), (0.6, []), (0.97, ["p-0", "p-1"])])
def test_how_like_an_evaluation_set_texts_may_be_is_what_similarity_says(write_pairs, tmp_path, similarity, stay):
    words = LONG + " and a dog barks at the rising moon from the garden wall of the last house in the village"
    near = [
        words.replace("seventeen white", "seventeen grey"),
        words.replace("rising moon from the garden wall of the", "x"),
    ]
    other = ["what is asked of this first one", "and of the second something else"]
    shards = write_pairs("p", list(zip(other, near, strict=True)))
    test = write_pairs("test", [("x", words)])
    command = ["dedup", shards, "--against", test, "--similarity", similarity, "--out", tmp_path / "out", "--name", "n"]
    if stay:
        run(*command, "--workers", 1)
        assert keys(tmp_path / "out/text-pairs/n") == stay
    else:
        assert main([str(part) for part in [*command, "--workers", 1]]) == 2, "nothing is left"


@pytest.mark.parametrize(("options", "stay"), [((), 1), (("--distance", 0), 2), (("--distance", 15), 1)])
def test_how_alike_images_may_be_is_what_distance_says(write_images, tmp_path, options, stay):
    one = photo(3)
    other = Image.blend(one, photo(4), 0.05)
    bits = perceptual_hash(one) ^ perceptual_hash(other)
    assert 1 <= bits.bit_count() <= 4
    packed = [encoded(one), encoded(one, compress_level=0), encoded(other)]
    assert packed[0] != packed[1]
    shards = write_images("a", [(data, [text("x")]) for data in packed])
    run("dedup", shards, "--out", tmp_path / "out", "--name", "n", "--workers", 1, *options)
    assert keys(tmp_path / "out/image-short/n") == ["a-0", "a-2"][:stay], "what hashes alike goes at any distance"


def test_duplicates_across_data_sets_are_found_and_the_bytes_are_the_same_from_array_tasks(
    write_pairs, tmp_path, capsys
):
    many = [
        (f"question {n} about {LONG}"[: 40 + n], f"answer {n}: {n * n} and nothing else than {n * 7}")
        for n in range(12)
    ]
    one, two = write_pairs("one", many), write_pairs("two", [*many[6:], ("something else", "altogether")])
    out = tmp_path / "out"
    command = ["dedup", one, two, "--out", out, "--name", "n", "--exact"]
    run(*command, "--workers", 1)
    assert len(Dataset.open(out / "text-pairs/n")) == 13
    out.rename(tmp_path / "alone")
    for task in ("0/2", "1/2", "0/2", "1/2"):
        run(*command, "--workers", 1, "--task", task)
    assert files(out) == files(tmp_path / "alone")
    capsys.readouterr()
    run(*command, "--workers", 2)
    assert "nothing to do" in capsys.readouterr().out


def test_a_stopped_survey_goes_on_where_it_was(write_images, tmp_path, monkeypatch):
    from data_prep.curation import image_duplicates

    shards = write_images("a", [(encoded(photo(seed // 2)), [text("x")]) for seed in range(12)])
    out = tmp_path / "out"
    command = ["dedup", shards, "--out", out, "--name", "n", "--workers", 1]
    run(*command)
    out.rename(tmp_path / "alone")
    signed, sign = [], image_duplicates.sign

    def sign_and_stop(piece, options, output):
        signed.append(piece["first"])
        if len(signed) == 3:
            raise KeyboardInterrupt
        sign(piece, options, output)

    monkeypatch.setattr(image_duplicates, "sign", sign_and_stop)
    assert main([str(part) for part in command]) == 130
    run(*command)
    assert signed == [0, 3, 6, 6, 9]
    assert files(out) == files(tmp_path / "alone")


def test_kinds_that_cannot_be_compared_are_refused(write_images, write_pairs, tmp_path, capsys):
    images, pairs = write_images("i", [(encoded(photo(1)), [text("x")])]), write_pairs("p", [("a", "b")])
    out = ("--out", str(tmp_path / "o"), "--name", "n")
    assert main(["dedup", images, pairs, *out]) == 2
    assert "expected one kind" in capsys.readouterr().err
    assert main(["dedup", images, "--against", pairs, *out]) == 2
    assert "can only be compared with its kind" in capsys.readouterr().err
    assert main(["dedup", images, images, *out]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_piece_of_a_survey_whose_arrays_are_damaged_is_named_and_once_gone_surveyed_again(
    tmp_path, monkeypatch, capsys
):
    with DatasetWriter(tmp_path / "pairs", kind="text-pairs", source="made", samples_per_shard=2) as writer:
        for number in range(6):
            sides = {side: [{"text": f"{side} {number}", "language": "en"}] for side in ("query", "target")}
            content = json.dumps({**sides, "source": "made", "item": f"item-{number}"}).encode()
            writer.write(f"k{number}", {"json": content}, languages=["en"], tokens=None)
    command = ["dedup", str(tmp_path / "pairs"), "--out", str(tmp_path / "out"), "--name", "clean", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.curation.passes.run_job", lambda *_: None)
        assert main(command) == 0
    (lost,) = (tmp_path / "out").glob("clean.survey-*/00001.npz")
    content = lost.read_bytes()
    for damaged in (b"", content[:100], content[:-30], content.replace(b"NUMPY", b"NUMPX"), b"\0" * 4096):
        lost.write_bytes(damaged)
        assert main(command) == 2
        assert f"{lost}: damaged" in capsys.readouterr().err
    lost.unlink()
    assert main(command) == 0
    assert len(Dataset.open(tmp_path / "out/text-pairs/clean")) > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["text-pairs"]


def test_training_texts_are_told_by_the_sets_that_evalset_writes(tmp_path, capsys):
    """A retrieval set and pairs of sentences, from the rows that MTEB's repositories hold."""
    document = "The quick brown fox jumps over the lazy dog near the river bank at dawn"
    title = "A title as long as its text, with which importers join it"
    rows = {
        "corpus": [
            {"_id": "d1", "title": title, "text": "something else that nobody asks about in this test"},
            {"_id": "d2", "title": "fox", "text": document},
        ],
        "queries": [{"_id": "q1", "text": "which animal jumps over another animal at dawn near a river"}],
        "pairs": [{"sentence1": "a man is playing a large wooden flute outside", "sentence2": "short", "score": 1.5}],
    }
    for name, of in rows.items():
        folder = tmp_path / ("sts" if name == "pairs" else "beir")
        folder.mkdir(exist_ok=True)
        (folder / f"{'test' if name == 'pairs' else name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of))
    (tmp_path / "beir/qrels").mkdir()
    (tmp_path / "beir/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    for kind, source, name in (("beir", "beir", "Fox"), ("sts", "sts/test.jsonl", "STS12")):
        assert main(["evalset", kind, str(tmp_path / source), "--name", name, "--out", str(tmp_path / "eval")]) == 0
    lines = [
        ("a question of our own, long enough to be looked for", document),
        ("a man is playing a large wooden flute outside", "something that only training has, and long enough"),
        ("short", "another text that only training has, of another topic"),
        ("which animal jumps over another animal at dawn near a river", "the fox, says the book of animals"),
        ("what else does the book say", f"{title} something else that nobody asks about in this test"),
    ]
    with DatasetWriter(tmp_path / "train", kind="text-pairs", source="web") as writer:
        for number, (query, other) in enumerate(lines):
            content = {side: [{"text": text, "language": "en"}] for side, text in (("query", query), ("target", other))}
            writer.write(f"s{number}", {"json": json.dumps(content).encode()}, languages=["en"], tokens=None)
    sets = [str(tmp_path / "eval/test/text" / name) for name in ("Fox", "STS12")]
    command = ["dedup", str(tmp_path / "train"), "--against", *sets, "--out", str(tmp_path / "out"), "--name", "web"]
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for like in ("Fox: corpus-2", "STS12: test-1-1", "Fox: queries-1", "Fox: corpus-1-titled"):
        assert like in said
    assert "1 of 5 would stay" in said
    assert main([*command, "--workers", "1"]) == 0
    kept = Dataset.open(tmp_path / "out/text-pairs/web")
    assert [kept.row(number).key for number in range(len(kept))] == ["s2"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["text-pairs"]  # nothing of the comparison
    (tmp_path / "eval/test/text/Fox/corpus.jsonl").write_text("{}\n")
    assert main([*command[:-1], "again", "--dry-run"]) == 2
    assert "corpus.jsonl has changed since it was written" in capsys.readouterr().err
