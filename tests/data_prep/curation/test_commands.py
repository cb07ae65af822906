"""The curation commands end to end: what stays, what goes for which reason, and the same bytes however it is run."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from data_prep.cli import main
from data_prep.curation.passes import sample_at
from data_prep.curation.similarity import _image, keep
from data_prep.inspection.validate import validate
from data_prep.shards import Dataset, DatasetWriter

from .conftest import contents, encoded, keys, photo, receipt, run, text

LONG = "the old lighthouse keeper counts seventeen white boats on the grey sea while evening falls over the cliffs"


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
