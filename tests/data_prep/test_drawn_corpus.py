"""The corpus as a whole, on drawn pictures: splits, kinds, determinism, and what stands in the way of a build."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json

import pytest
import sentencepiece
from data_prep.corpus import Settings, build_corpus
from data_prep.corpus.items import normalized
from data_prep.errors import UserError
from data_prep.shards import Dataset
from PIL import Image

SPLITS = ("train", "validation", "test")
KINDS = ("text-pairs", "text-triplets", "image-short", "image-long")


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_two_builds_are_equal_byte_for_byte_whatever_the_number_of_workers(drawn, drawn_settings, tmp_path):
    build_corpus(tmp_path / "again", drawn_settings, workers=3, log=lambda line: None)
    assert files(tmp_path / "again") == files(drawn)


def test_another_seed_gives_another_split(drawn, drawn_settings, tmp_path, read_all):
    build_corpus(tmp_path / "other", dataclasses.replace(drawn_settings, seed=1), log=lambda line: None)
    one, two = ({s["item"] for s in read_all(root / "test/image-short/drawn")} for root in (drawn, tmp_path / "other"))
    assert one != two


def test_every_split_has_all_four_kinds_and_every_data_set_is_whole(drawn):
    counts = json.loads((drawn / "corpus.json").read_text())["samples"]
    for split in SPLITS:
        assert set(counts[split]) == {f"{kind}/drawn" for kind in KINDS}
        for name, count in counts[split].items():
            assert len(Dataset.open(drawn / split / name, verify=True)) == count
    assert min(counts[split]["image-short/drawn"] for split in SPLITS[1:]) >= 150 * 15 // 100


def test_no_item_family_picture_or_caption_is_in_two_splits(drawn, read_all):
    items, families, pictures, captions = [], [], [], []
    for split in SPLITS:
        dataset = Dataset.open(drawn / split / "image-short/drawn")
        pictures.append({hashlib.sha256(dataset.read(index)["png"]).digest() for index in range(len(dataset))})
        assert len(pictures[-1]) == len(dataset)
        samples = [sample for kind in KINDS for sample in read_all(drawn / split / kind / "drawn")]
        items.append({sample["item"] for sample in samples})
        short = read_all(drawn / split / "image-short/drawn")
        english = [text["text"] for sample in short for text in sample["captions"] if text["language"] == "en"]
        families.append({caption.split(",")[0] for caption in english})  # "red circle"
        captions.append({text["text"] for sample in short for text in sample["captions"]})
    for sets in (items, families, pictures, captions):
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]
        assert not sets[1] & sets[2]


def test_triplets_have_seven_different_negatives_from_their_split_none_equal_to_the_positive(drawn, read_all):
    for split in SPLITS:
        names = {
            tuple(text["text"] for text in sample["captions"])
            for sample in read_all(drawn / split / "image-short/drawn")
        }
        for sample in read_all(drawn / split / "text-triplets/drawn"):
            negatives = [tuple(text["text"] for text in negative) for negative in sample["negatives"]]
            assert len(negatives) == len(set(negatives)) == 7
            assert set(negatives) <= names
            positive = {normalized(text["text"]) for text in (*sample["query"], *sample["target"])}
            assert all(normalized(text) not in positive for negative in negatives for text in negative)


def test_negatives_are_neighbours(drawn, read_all):
    """In training, where every shape comes in many colours, most negatives have the positive's shape."""
    shared = total = 0
    for sample in read_all(drawn / "train/text-triplets/drawn"):
        shape = next(text["text"] for text in sample["target"] if text["language"] == "en").split(",")[0].split()[1]
        for negative in sample["negatives"]:
            english = next(text["text"] for text in negative if text["language"] == "en")
            shared += english.split(",")[0].split()[1] == shape
            total += 1
    assert shared / total > 0.9


def test_every_text_carries_language_origin_and_role_and_the_sidecar_lists_the_languages(drawn, read_all):
    for kind in KINDS:
        dataset = Dataset.open(drawn / "test" / kind / "drawn")
        for index, sample in enumerate(read_all(drawn / "test" / kind / "drawn")):
            texts = [text for field in ("captions", "query", "target") for text in sample.get(field, [])]
            assert all(text["text"] and text["origin"] == "synthetic:drawn" for text in texts)
            assert {text["role"] for text in texts} == {"long" if kind == "image-long" else "name"}
            assert set(dataset.row(index).languages) == {text["language"] for text in texts}
            assert len(dataset.row(index).languages) == 8
            assert sample["source"] == "drawn"


def test_tokens_are_those_of_the_longest_text_with_start_and_end(drawn, read_all):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(drawn / "tokenizer.model"))
    dataset = Dataset.open(drawn / "test/text-triplets/drawn")
    assert dataset.manifest["tokenizer_sha256"] == hashlib.sha256((drawn / "tokenizer.model").read_bytes()).hexdigest()
    for index, sample in enumerate(read_all(drawn / "test/text-triplets/drawn")):
        texts = [*sample["query"], *sample["target"], *(text for negative in sample["negatives"] for text in negative)]
        assert dataset.row(index).tokens == max(len(processor.encode(text["text"])) + 2 for text in texts)


def test_tokenizer_has_the_layout_that_xlm_r_expects(drawn):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(drawn / "tokenizer.model"))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.get_piece_size() == 384


def test_pictures_are_square_rgb(drawn):
    dataset = Dataset.open(drawn / "test/image-long/drawn")
    picture = Image.open(io.BytesIO(dataset.read(0)["png"]))
    assert (picture.mode, picture.size) == ("RGB", (32, 32))


def test_an_existing_corpus_is_left_alone_and_said_so(drawn, drawn_settings):
    before = files(drawn)
    said = []
    assert (
        build_corpus(drawn, drawn_settings, log=said.append)["samples"] == json.loads(before["corpus.json"])["samples"]
    )
    assert said == [f"{drawn}: already built, with this version and these settings; nothing to do"]
    assert files(drawn) == before


def test_another_corpus_in_the_way_is_named_and_not_touched(drawn, drawn_settings, tmp_path):
    before = files(drawn)
    with pytest.raises(UserError, match=r"holds another corpus \(seed 0, asked for 5\)"):
        build_corpus(drawn, dataclasses.replace(drawn_settings, seed=5))
    assert files(drawn) == before
    folder = tmp_path / "older"
    folder.mkdir()
    (folder / "corpus.json").write_text(json.dumps(json.loads(before["corpus.json"]) | {"version": 0}))
    with pytest.raises(UserError, match="version 0, this program writes 2"):
        build_corpus(folder, drawn_settings)
    (folder / "corpus.json").write_text("my notes")
    with pytest.raises(UserError, match="exists and is no corpus"):
        build_corpus(folder, drawn_settings)
    assert (folder / "corpus.json").read_text() == "my notes"


def test_a_shard_that_went_missing_is_named_on_the_next_run(drawn_settings, tmp_path):
    settings = dataclasses.replace(drawn_settings, drawn=120)
    build_corpus(tmp_path / "c", settings, log=lambda line: None)
    (tmp_path / "c/train/text-pairs/drawn/00000.tar").unlink()
    with pytest.raises(UserError, match=r"train/text-pairs/drawn/00000\.tar: missing"):
        build_corpus(tmp_path / "c", settings)


def test_what_an_interrupted_build_left_is_removed_and_said(drawn_settings, tmp_path, monkeypatch):
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial/half").write_text("half")
    said = []
    build_corpus(tmp_path / "c", drawn_settings, log=said.append)
    assert "removing what an interrupted run left" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.corpus.build.write_datasets", fail)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "d", drawn_settings, log=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("number", [3, 100_000])
def test_an_impossible_number_of_pictures_is_refused(tmp_path, number):
    with pytest.raises(UserError, match="expected a number from 120 to 3840"):
        build_corpus(tmp_path / "c", Settings(drawn=number))


def test_too_large_a_vocabulary_is_refused(drawn_settings, tmp_path):
    with pytest.raises(UserError, match="no tokenizer of 30000 pieces from these texts; change --vocab-size"):
        build_corpus(tmp_path / "c", dataclasses.replace(drawn_settings, vocab_size=30_000), log=lambda line: None)
    assert list(tmp_path.iterdir()) == []
