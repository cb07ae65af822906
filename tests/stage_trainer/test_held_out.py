"""What `evaluate` and `search` take for held-out data, and what they say where there is none."""

import json

import pytest
from data_prep.shards import DatasetWriter
from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import find
from stage_trainer.evaluation.retrieval import Pool


@pytest.fixture
def write(tmp_path, png):
    def execute(place, kind="image-short", source=None, captions=(("a", "name"),)):
        directory = tmp_path / place
        with DatasetWriter(directory, kind=kind, source=source or directory.name) as writer:
            made = [{"text": text, "language": "en", "role": role} for text, role in captions]
            if kind.startswith("image"):
                members = {"png": png, "json": json.dumps({"captions": made}).encode()}
            else:
                members = {"json": json.dumps({"query": made, "target": made}).encode()}
            writer.write("s", members, languages=["en"], tokens=None)
        return directory

    return execute


def names(data):
    found = find(data)
    return found.where, [(each.kind, each.name) for each in found.sets]


def test_of_a_corpus_the_test_split_is_measured_and_said(tmp_path, write):
    write("validation/image-short/mine")
    assert names(tmp_path) == (f"the validation split of {tmp_path}", [("image-short", "mine")])
    write("train/image-short/mine")
    write("test/text-pairs/other", "text-pairs")
    write("test/image-long/mine", "image-long")
    assert names(tmp_path) == (
        f"the test split of {tmp_path}", [("image-long", "mine"), ("text-pairs", "other")],
    )  # fmt: skip


@pytest.mark.parametrize("place", ["", "validation", "validation/image-short", "validation/image-short/mine"])
def test_what_an_import_wrote_is_found_from_every_folder_above_it(tmp_path, write, place):
    write("validation/image-short/mine")
    assert names(tmp_path / place)[1] == [("image-short", "mine")]


def test_no_two_data_sets_have_one_name(tmp_path, write):
    write("validation/image-long/mine", "image-long")
    write("validation/image-short/mine")
    write("validation/image-short/again", source="mine")
    found = find(tmp_path).sets
    assert len({each.name for each in found}) == 3
    assert found[0].name == "mine"
    assert found[0].kind == "image-short", "what short captions are measured on comes first"


def test_places_without_held_out_data_are_one_message(tmp_path, write):
    with pytest.raises(UserError, match="there is no folder"):
        find(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no held-out data sets. Expected"):
        find(tmp_path)
    write("train/image-short/mine")
    with pytest.raises(UserError, match="the train split that it has is what models learn from"):
        find(tmp_path)
    with pytest.raises(UserError, match="is an address"):
        find("s3://bucket/corpus")
    (write("validation/image-short/mine") / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000\.tar"):
        find(tmp_path)


def test_long_captions_count_where_they_are_what_the_data_set_is_of(write):
    captions = (("long and short", "long"), ("a word", "name"))
    assert Pool.open(write("a/image-long/mine", "image-long", captions=captions)).all_texts() == [
        "a word", "long and short",
    ]  # fmt: skip
    assert Pool.open(write("a/image-short/mine", captions=captions)).all_texts() == ["a word"]


def test_a_pool_without_captions_to_measure_is_refused_by_name(write):
    with pytest.raises(UserError, match="captions of the role keywords alone; expected captions of the role name or"):
        Pool.open(write("a/image-short/mine", captions=(("a", "keywords"),)))
