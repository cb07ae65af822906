"""The curation commands end to end: what stays, what goes for which reason, and the same bytes however it is run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_prep.cli import main
from data_prep.curation.language_id import identify
from data_prep.curation.passes import sample_at
from data_prep.curation.phash import perceptual_hash
from data_prep.curation.similarity import _image, keep
from data_prep.inspection.validate import validate
from data_prep.shards import Dataset, DatasetWriter
from PIL import Image

from .conftest import contents, encoded, files, keys, photo, text

LONG = "the old lighthouse keeper counts seventeen white boats on the grey sea while evening falls over the cliffs"


def receipt(folder: Path) -> dict:
    return json.loads((folder / "receipt.json").read_text())


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


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
    other = Image.blend(one, photo(4), 0.12)
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
    from data_prep.curation import dedup

    shards = write_images("a", [(encoded(photo(seed // 2)), [text("x")]) for seed in range(12)])
    out = tmp_path / "out"
    command = ["dedup", shards, "--out", out, "--name", "n", "--workers", 1]
    run(*command)
    out.rename(tmp_path / "alone")
    signed, sign = [], dedup.sign

    def sign_and_stop(piece, options, output):
        signed.append(piece["first"])
        if len(signed) == 3:
            raise KeyboardInterrupt
        sign(piece, options, output)

    monkeypatch.setattr(dedup, "sign", sign_and_stop)
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


def test_long_captions_are_held_out_by_the_tokenizers_count(write_images, drawn, tmp_path):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(drawn / "tokenizer.model"))
    words = [" ".join(["red circle"] * count) for count in (1, 3, 6, 12)]
    counts = [len(pieces.encode(line)) + 2 for line in words]
    png = encoded(photo(1))
    shards = write_images(
        "c", [(png, [text(words[0]), text(words[3])]), (png, [text(words[1])]), (png, [text(words[2])])]
    )
    out = tmp_path / "out"
    run("split-long", shards, "--tokenizer", drawn / "tokenizer.model", "--longest", counts[1], "--out", out,
        "--name", "c", "--workers", 1)  # fmt: skip
    short, long = out / "image-short/c", out / "image-long/c"
    assert keys(short) == ["c-0", "c-1"]
    assert keys(long) == ["c-0", "c-2"]
    assert [[one["text"] for one in sample["captions"]] for sample in contents(long)] == [[words[3]], [words[2]]]
    assert [Dataset.open(long).row(n).tokens for n in range(2)] == [counts[3], counts[2]]
    assert [Dataset.open(short).row(n).tokens for n in range(2)] == [counts[0], counts[1]]
    import hashlib

    digest = hashlib.sha256((drawn / "tokenizer.model").read_bytes()).hexdigest()
    assert Dataset.open(long).manifest["tokenizer_sha256"] == Dataset.open(short).manifest["tokenizer_sha256"] == digest


def test_a_probability_that_is_none_is_refused(write_pairs, tmp_path, capsys):
    command = ["languages", write_pairs("p", [("a", "b")]), "--out", str(tmp_path / "out"), "--name", "x"]
    assert main([*command, "--sure", "7"]) == 2
    assert "--sure 7.0: expected a probability" in capsys.readouterr().err


def test_something_that_is_no_tokenizer_is_refused(write_images, tmp_path, capsys):
    shards = write_images("c", [(encoded(photo(1)), [text("x")])])
    for name in ("x.json", "x.model"):
        (tmp_path / name).write_text("{}")
        command = ["split-long", shards, "--tokenizer", str(tmp_path / name), "--out", str(tmp_path), "--name", "n"]
        assert main(command) == 2
        assert f"{name}: not a tokenizer" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "none"), *command[4:]]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_texts_get_their_language_and_those_in_another_go(write_pairs, write_images, tmp_path):
    german = "Der alte Leuchtturmwärter zählt siebzehn weiße Boote auf dem grauen Meer."
    danish = "Den gamle fyrpasser tæller sytten hvide både på det grå hav, mens aftenen falder på."
    swahili = "Mlinzi wa zamani wa mnara wa taa anahesabu boti kumi na saba nyeupe baharini."
    png = encoded(photo(1))
    captions = [
        [text(LONG, "und"), text(german, "und")],
        [text(german, "en"), text("Hund", "en")],
        [text(swahili, "und")],
        [text(danish, "da")],
        [text(LONG, "sw")],
        [text(LONG, "de")],
    ]
    shards = write_images("c", [(png, own) for own in captions])
    run("languages", shards, "--out", tmp_path, "--name", "known", "--workers", 1)
    found = contents(tmp_path / "image-short/known")
    assert [[(one["text"], one["language"]) for one in sample["captions"]] for sample in found] == [
        [(LONG, "en"), (german, "de")],
        [("Hund", "en")],
        [(danish, "da")],
    ]
    assert Dataset.open(tmp_path / "image-short/known").row(0).languages == ("de", "en")
    notes = receipt(tmp_path / "image-short/known")["notes"]
    assert notes["texts out: clearly in another language than said"] == 2
    assert notes["texts out: a language that is none of the thirty"] == 1
    assert notes["texts that got a language"] == 2
    run("languages", shards, "--out", tmp_path, "--name", "foreign", "--without", "en", "da", "--workers", 1)
    assert [[one["text"] for one in sample["captions"]] for sample in contents(tmp_path / "image-short/foreign")] == [
        [german]
    ]
    assert main(["languages", str(shards), "--out", str(tmp_path), "--name", "x", "--without", "xx"]) == 2


@pytest.mark.parametrize("among_all", [False, True])
def test_danish_norwegian_and_swedish_are_told_apart(among_all):
    texts = {
        "da": "Den gamle fyrpasser tæller sytten hvide både på det grå hav, mens aftenen falder på.",
        "no": "Den gamle fyrvokteren teller sytten hvite båter på det grå havet mens kvelden faller på.",
        "sv": "Den gamle fyrvaktaren räknar sjutton vita båtar på det grå havet medan kvällen faller.",
    }
    assert {language: identify(line, among_all=among_all)[0] for language, line in texts.items()} == {
        language: language for language in texts
    }


def test_the_best_share_of_each_language_stays():
    scores = [np.array([0.9, 0.1, 0.5], np.float32), np.array([0.3, 0.3, 0.2], np.float32)]
    languages = [np.array(["en", "en", "de"]), np.array(["en", "en", "de"])]
    kept = keep(scores, languages, None, 0.5)
    assert [part.tolist() for part in kept] == [[True, False, True], [True, False, False]]
    kept = keep(scores, languages, 0.3, None)
    assert [part.tolist() for part in kept] == [[True, False, True], [True, True, False]]
    assert keep([np.array([-np.inf, 0.1])], [np.array(["en", "en"])], None, 1.0)[0].tolist() == [False, True]
    assert sum(part.sum() for part in keep([np.arange(10.0)], [np.full(10, "en")], None, 0.3)) == 3


@pytest.fixture
def captioned(write_images):
    words = ["red circle", "blue square", "green star", "a large yellow triangle", "grey ring", "two black lines"]
    return write_images("c", [(encoded(photo(n)), [text(words[n]), text(words[n - 1])]) for n in range(6)]), words


def test_captions_are_cut_by_the_similarity_that_our_model_sees(dual_encoder, captioned, tmp_path):
    folder, model = dual_encoder
    shards, words = captioned
    images, texts = model.encode_image([photo(n) for n in range(6)]), model.encode_text(words)
    scores = {(n, words[m]): float(images[n] @ texts[m]) for n in range(6) for m in (n, n - 1)}
    middle = sum(sorted(scores.values())[5:7]) / 2
    expected = {pair for pair, score in scores.items() if score >= middle}
    out = tmp_path / "out"
    common = ("--model", folder, "--out", out, "--workers", 1)
    run("similarity", shards, "--threshold", middle, "--name", "threshold", *common)
    run("similarity", shards, "--top", 0.5, "--name", "top", *common)
    for name in ("threshold", "top"):
        found = contents(out / "image-short" / name)
        pairs = {(int(sample["item"][5:]), one["text"]) for sample in found for one in sample["captions"]}
        assert pairs == expected
    counted = receipt(out / "image-short/top")
    assert counted["notes"]["captions out"] == 6
    assert counted["went_out"]["image-short"] + sum(counted["dropped"].values()) == 6


def test_captions_are_cut_by_the_similarity_that_open_clip_sees(captioned, tmp_path):
    import open_clip
    import torch

    shards, words = captioned
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-seer.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-seer.json")
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms("tiny-seer")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(photo(n)) for n in range(6)]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer("tiny-seer")(words), normalize=True)
    scores = {(n, words[m]): float(images[n] @ texts[m]) for n in range(6) for m in (n, n - 1)}
    middle = sum(sorted(scores.values())[5:7]) / 2
    run("similarity", shards, "--threshold", middle, "--model", f"open_clip:tiny-seer:{tmp_path / 'weights.pt'}",
        "--name", "n", "--out", tmp_path / "out", "--workers", 1)  # fmt: skip
    found = contents(tmp_path / "out/image-short/n")
    pairs = {(int(sample["item"][5:]), one["text"]) for sample in found for one in sample["captions"]}
    assert pairs == {pair for pair, score in scores.items() if score >= middle}


def test_a_model_that_is_none_is_refused(captioned, tmp_path, capsys):
    command = ["similarity", captioned[0], "--top", "0.5", "--out", str(tmp_path), "--name", "n", "--workers", "1"]
    assert main([*command, "--model", str(tmp_path)]) == 2
    assert "has no text/ and vision/" in capsys.readouterr().err
    for name in ("text", "vision"):
        (tmp_path / "model" / name).mkdir(parents=True)
    assert main([*command, "--model", str(tmp_path / "model")]) == 2
    assert f"cannot load {tmp_path / 'model'}: " in capsys.readouterr().err
    for name in ("text", "vision"):
        (tmp_path / "model" / name / "config.json").write_text("{")
    assert main([*command, "--model", str(tmp_path / "model")]) == 2
    assert f"cannot load {tmp_path / 'model'}: " in capsys.readouterr().err
    assert main([*command, "--model", "open_clip:no-such-model:"]) == 2
    assert "open_clip cannot make it" in capsys.readouterr().err


def test_somebody_elses_shards_with_plain_captions_can_be_shaped(drawn, tmp_path):
    with DatasetWriter(tmp_path / "theirs", kind="image-short", source="web") as writer:
        for number in range(2):
            members = {"jpg": encoded(photo(number), "JPEG"), "txt": b"red circle", "json": b'{"url": "x", "width": 9}'}
            writer.write(f"{number:09d}", members, languages=["en"], tokens=None)
    run("split-long", tmp_path / "theirs", "--tokenizer", drawn, "--out", tmp_path, "--name", "n", "--workers", 1)
    (sample, _) = contents(tmp_path / "image-short/n")
    assert sample["captions"] == [text("red circle")]
    run("dedup", tmp_path / "theirs", "--out", tmp_path, "--name", "d", "--workers", 1)
    assert Dataset.open(tmp_path / "image-short/d").read(0) == Dataset.open(tmp_path / "theirs").read(0)


@pytest.mark.parametrize("ending", ["jpeg", "JPG"])
def test_somebody_elses_jpegs_can_be_shaped_whatever_they_are_called(tmp_path, ending):
    photos = [encoded(photo(seed), "JPEG") for seed in (0, 1, 0)]
    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs/0.tar", "w") as tar:
        for number, data in enumerate(photos):
            for name, content in ((f"k{number}.{ending}", data), (f"k{number}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    run("index", tmp_path / "theirs", "--out", tmp_path / "a", "--workers", 1)
    indexed = tmp_path / "a/image-short/indexed"
    run("dedup", indexed, "--out", tmp_path / "b", "--name", "clean", "--workers", 1)
    assert keys(tmp_path / "b/image-short/clean") == ["k0", "k1"]
    assert list(validate(tmp_path / "b/image-short/clean")) == []
    image = _image(sample_at(Dataset.open(indexed), 0))
    assert image is not None
    assert image.size == (64, 64)


def test_the_mix_is_what_a_trainer_would_draw(write_images, write_pairs, capsys):
    one = write_images("one", [(encoded(photo(n)), [text("x", "en"), text("y", "de")]) for n in range(3)])
    two = write_pairs("two", [("a", "b")])
    run("mix", one, two)
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["75.0%", "3"], ["25.0%", "1"]]
    assert [line.split() for line in out.splitlines()[-2:]] == [["62.5%", "en"], ["37.5%", "de"]]
    run("mix", one, two, "--weights", 1, 3)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [["87.5%", "en"], ["12.5%", "de"]]
    assert main(["mix", one, two, "--weights", "1"]) == 2


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
